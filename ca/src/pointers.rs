//! Where CRLs, OCSP responses and CA certificates are published, as certificates say it.
//!
//! A pointer is fixed at issuance and never moves: the CRL of a shard names, byte for byte, the address that stands in
//! that shard's certificates (RFC 5280 §5.2.5). All are plain `http`, since what they serve is signed and a TLS client
//! that needs them to check a certificate could not fetch them otherwise (RFC 5280 §8).

use std::fmt;
use std::num::NonZeroU16;
use std::str::FromStr;

use crate::leaf::KeyIdentifier;
use crate::serial::SerialNumber;

/// Longest address in a certificate, in bytes.
pub const URL_BYTES_MAX: usize = 512;

/// Most CRL shards of one issuing CA.
pub const CRL_SHARDS_MAX: u16 = 1024;

/// Why a text is not an address for a certificate.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum UrlError {
    #[error("address is not of the form http://HOST/PATH")]
    Form,
    #[error("address is {0} bytes long, at most {URL_BYTES_MAX} are allowed")]
    TooLong(usize),
    #[error("address has a blank, a control character or one outside ASCII")]
    Character,
    #[error("number of CRL shards is not 1 to {CRL_SHARDS_MAX}")]
    Shards,
}

/// A plain `http` URL with a host, as it stands in a certificate.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct HttpUrl(String);

impl HttpUrl {
    /// Takes `text` as it is.
    pub fn parse(text: &str) -> Result<Self, UrlError> {
        if text.len() > URL_BYTES_MAX {
            return Err(UrlError::TooLong(text.len()));
        }
        if !text.bytes().all(|b| b.is_ascii_graphic()) {
            return Err(UrlError::Character);
        }
        let rest = text.strip_prefix("http://").ok_or(UrlError::Form)?;
        let host = rest.split(['/', '?', '#']).next().unwrap_or_default();
        if host.is_empty() || host.contains('@') || host.starts_with(':') || text.contains('#') {
            return Err(UrlError::Form);
        }
        Ok(Self(text.to_owned()))
    }

    /// The address as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    fn join(&self, rest: &str) -> Result<Self, UrlError> {
        Self::parse(&format!("{}/{rest}", self.0.trim_end_matches('/')))
    }
}

impl fmt::Display for HttpUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for HttpUrl {
    type Err = UrlError;
    fn from_str(text: &str) -> Result<Self, UrlError> {
        Self::parse(text)
    }
}

/// What one certificate says about where to look.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Pointers {
    /// cRLDistributionPoints: the CRL of its shard (RFC 5280 §4.2.1.13).
    pub crl: Option<HttpUrl>,
    /// authorityInfoAccess, id-ad-ocsp (RFC 5280 §4.2.2.1, RFC 6960 §3.1).
    pub ocsp: Option<HttpUrl>,
    /// authorityInfoAccess, id-ad-caIssuers: the issuer's certificate as DER.
    pub issuer: Option<HttpUrl>,
}

impl Pointers {
    /// Whether the certificate points nowhere.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

/// How one mesh publishes: a base address and the number of CRL shards of each issuing CA.
///
/// | what | address |
/// |---|---|
/// | CRL of a shard | `BASE/crl/ISSUER/SHARD.crl` |
/// | CRL for the CA certificates that a CA signed | `BASE/crl/ISSUER/ca.crl` |
/// | OCSP, GET and POST | `BASE/ocsp` |
/// | a CA's certificate | `BASE/ca/ISSUER.cer` |
///
/// `ISSUER` is the subject key identifier in hex, `SHARD` a decimal number.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PublishingPoints {
    base: HttpUrl,
    shards: NonZeroU16,
}

impl PublishingPoints {
    /// `base` without query; `shards` from 1 to [`CRL_SHARDS_MAX`].
    pub fn new(base: HttpUrl, shards: u16) -> Result<Self, UrlError> {
        if base.as_str().contains('?') {
            return Err(UrlError::Form);
        }
        let shards = NonZeroU16::new(shards).filter(|n| n.get() <= CRL_SHARDS_MAX).ok_or(UrlError::Shards)?;
        let points = Self { base, shards };
        // The longest address must fit, so that no issuance fails over it later.
        points.base.join(&format!("crl/{}/{}.crl", "0".repeat(40), CRL_SHARDS_MAX))?;
        Ok(points)
    }

    /// The base address.
    pub fn base(&self) -> &HttpUrl {
        &self.base
    }

    /// CRL shards of each issuing CA.
    pub fn shards(&self) -> u16 {
        self.shards.get()
    }

    /// The shard of a new certificate: the last eight octets of its serial, modulo the number of shards. Recorded with the
    /// certificate, since the number of shards may change later.
    pub fn shard_of(&self, serial: &SerialNumber) -> u16 {
        let (_, tail) = serial.as_bytes().split_last_chunk::<8>().expect("a serial has 16 octets");
        let shard = u64::from_be_bytes(*tail) % u64::from(self.shards.get());
        u16::try_from(shard).expect("below a number of 16 bits")
    }

    /// Address of the CRL of one shard of the issuing CA with this subject key identifier.
    pub fn crl(&self, issuer: &KeyIdentifier, shard: u16) -> Result<HttpUrl, UrlError> {
        self.base.join(&format!("crl/{issuer}/{shard}.crl"))
    }

    /// Address of the CRL for the CA certificates that this CA signed. That CRL itself names no address: a root's own
    /// certificate has no pointer, and a CRL limited to an address would not speak for it (OpenSSL `-crl_check_all`, error 44).
    pub fn ca_crl(&self, issuer: &KeyIdentifier) -> Result<HttpUrl, UrlError> {
        self.base.join(&format!("crl/{issuer}/ca.crl"))
    }

    /// Address of the OCSP responder.
    pub fn ocsp(&self) -> Result<HttpUrl, UrlError> {
        self.base.join("ocsp")
    }

    /// Address of a CA's certificate.
    pub fn ca_certificate(&self, issuer: &KeyIdentifier) -> Result<HttpUrl, UrlError> {
        self.base.join(&format!("ca/{issuer}.cer"))
    }

    /// All pointers of a leaf in `shard` of the issuing CA.
    pub fn leaf(&self, issuer: &KeyIdentifier, shard: u16) -> Result<Pointers, UrlError> {
        Ok(Pointers {
            crl: Some(self.crl(issuer, shard)?),
            ocsp: Some(self.ocsp()?),
            issuer: Some(self.ca_certificate(issuer)?),
        })
    }

    /// The pointers of a CA certificate signed by the CA `issuer`: CRL and issuer. No OCSP: the root's key may be offline.
    pub fn ca(&self, issuer: &KeyIdentifier) -> Result<Pointers, UrlError> {
        Ok(Pointers {
            crl: Some(self.ca_crl(issuer)?),
            ocsp: None,
            issuer: Some(self.ca_certificate(issuer)?),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_plain_http_addresses_are_taken() {
        let long = format!("http://x/{}", "a".repeat(URL_BYTES_MAX));
        for (text, verdict) in [
            ("http://crl.mesh.internal/0.crl", Ok(())),
            ("http://10.0.0.1:8080", Ok(())),
            ("https://x/", Err(UrlError::Form)),
            ("HTTP://x/", Err(UrlError::Form)),
            ("http:///x", Err(UrlError::Form)),
            ("http://", Err(UrlError::Form)),
            ("http://u@h/", Err(UrlError::Form)),
            ("http://h/#f", Err(UrlError::Form)),
            ("http://:80/", Err(UrlError::Form)),
            ("ldap://x/", Err(UrlError::Form)),
            ("http://a b/", Err(UrlError::Character)),
            ("http://ü/", Err(UrlError::Character)),
            ("http://a\n/", Err(UrlError::Character)),
            (&long, Err(UrlError::TooLong(URL_BYTES_MAX + 9))),
        ] {
            assert_eq!(HttpUrl::parse(text).map(drop), verdict, "{text:?}");
        }
    }

    #[test]
    fn addresses_follow_from_base_issuer_and_shard() {
        let base = HttpUrl::parse("http://pki.mesh.internal/x/").unwrap();
        let points = PublishingPoints::new(base.clone(), 16).unwrap();
        let issuer = KeyIdentifier::new(&[0xab; 20]);
        let id = "ab".repeat(20);
        let pointers = points.leaf(&issuer, 7).unwrap();
        assert_eq!(pointers.crl.unwrap().as_str(), format!("http://pki.mesh.internal/x/crl/{id}/7.crl"));
        assert_eq!(pointers.ocsp.unwrap().as_str(), "http://pki.mesh.internal/x/ocsp");
        assert_eq!(pointers.issuer.unwrap().as_str(), format!("http://pki.mesh.internal/x/ca/{id}.cer"));
        let pointers = points.ca(&issuer).unwrap();
        assert_eq!(pointers.crl.unwrap().as_str(), format!("http://pki.mesh.internal/x/crl/{id}/ca.crl"));
        assert_eq!(pointers.ocsp, None);
        assert_eq!(PublishingPoints::new(base.clone(), 0), Err(UrlError::Shards));
        assert_eq!(PublishingPoints::new(base, CRL_SHARDS_MAX + 1), Err(UrlError::Shards));
    }

    #[test]
    fn every_serial_falls_into_one_shard_and_they_fill_evenly() {
        let points = PublishingPoints::new(HttpUrl::parse("http://h").unwrap(), 16).unwrap();
        let mut filled = [0_u32; 16];
        for _ in 0..4096 {
            let serial = SerialNumber::random(&mut |bytes: &mut [u8]| aws_lc_rs::rand::fill(bytes).unwrap());
            filled[usize::from(points.shard_of(&serial))] += 1;
        }
        // 256 expected in each; six standard deviations are 93.
        assert!(filled.iter().all(|count| (163..350).contains(count)), "{filled:?}");
    }
}
