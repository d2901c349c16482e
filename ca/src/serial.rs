//! Serial numbers of certificates.

use std::fmt;
use std::str::FromStr;

/// Octets of a serial number of ours.
const SERIAL_BYTES: usize = 16;

/// A certificate's serial number: 16 octets, of which 126 bits are random, always positive and
/// always encoded in 16 octets (RFC 5280 §4.1.2.2 asks for at most 20). Written as 32 lower-case hex digits.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SerialNumber([u8; SERIAL_BYTES]);

/// Why a value is not a serial number of ours.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SerialError {
    #[error("serial is not 32 hex digits")]
    Text,
    #[error("serial is {0} octets long, not 16")]
    Length(usize),
    #[error("serial does not begin with the bits 01")]
    LeadingBits,
}

impl SerialNumber {
    /// Draws a serial; the caller has to keep it unique among all it ever issued.
    pub fn random(rng: &mut dyn FnMut(&mut [u8])) -> Self {
        let mut bytes = [0; SERIAL_BYTES];
        rng(&mut bytes);
        // 0 keeps the integer positive; 1 keeps it 16 octets long, so that no two encodings exist.
        bytes[0] = bytes[0] & 0x3f | 0x40;
        Self(bytes)
    }

    /// Reads the octets of a DER integer's value.
    ///
    /// # Errors
    /// [`SerialError`] for anything this authority does not issue.
    pub fn from_slice(bytes: &[u8]) -> Result<Self, SerialError> {
        let bytes: [u8; SERIAL_BYTES] = bytes.try_into().map_err(|_| SerialError::Length(bytes.len()))?;
        if bytes[0] & 0xc0 != 0x40 {
            return Err(SerialError::LeadingBits);
        }
        Ok(Self(bytes))
    }

    /// The 16 octets, big endian.
    pub fn as_bytes(&self) -> &[u8; SERIAL_BYTES] {
        &self.0
    }
}

impl fmt::Display for SerialNumber {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex::encode(self.0))
    }
}

impl fmt::Debug for SerialNumber {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SerialNumber({self})")
    }
}

impl FromStr for SerialNumber {
    type Err = SerialError;
    /// Takes 32 hex digits of either case, as other tools print serials in upper case.
    fn from_str(text: &str) -> Result<Self, SerialError> {
        let mut bytes = [0; SERIAL_BYTES];
        hex::decode_to_slice(text, &mut bytes).map_err(|_| SerialError::Text)?;
        Self::from_slice(&bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_draw_is_positive_and_sixteen_octets_long() {
        for fill in [0x00, 0x3f, 0x80, 0xff] {
            let serial = SerialNumber::random(&mut |bytes: &mut [u8]| bytes.fill(fill));
            assert_eq!(serial.as_bytes()[0] & 0xc0, 0x40);
            assert_eq!(serial.to_string().parse(), Ok(serial));
            assert_eq!(serial.to_string().to_uppercase().parse(), Ok(serial));
        }
    }

    #[test]
    fn foreign_forms_are_refused() {
        assert_eq!("".parse::<SerialNumber>(), Err(SerialError::Text));
        assert_eq!("zz".repeat(16).parse::<SerialNumber>(), Err(SerialError::Text));
        assert_eq!("80".repeat(16).parse::<SerialNumber>(), Err(SerialError::LeadingBits));
        assert_eq!(SerialNumber::from_slice(&[0x40; 20]), Err(SerialError::Length(20)));
    }
}
