//! Records and World as bytes: CBOR (RFC 8949), inside an envelope that says what it is.

use mesh_core::Record;
use mesh_store::EncodedRecord;
use serde::{Deserialize, Serialize};

/// The layout of a record's body that this program writes.
const RECORD_VERSION: u32 = 1;

/// A record with its layout's version, so that a later program knows what it reads.
#[derive(Serialize, Deserialize)]
struct Envelope<T> {
    #[serde(rename = "v")]
    version: u32,
    #[serde(rename = "r")]
    body: T,
}

/// Why bytes of the journal or a snapshot are not what they should be.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CodecError {
    #[error("record cannot be encoded")]
    Encode(#[source] ciborium::ser::Error<std::io::Error>),
    #[error("record cannot be decoded")]
    Decode(#[source] ciborium::de::Error<std::io::Error>),
    #[error("record has version {found}, this program knows {RECORD_VERSION}")]
    Version { found: u32 },
}

/// A record as the journal keeps it.
pub(crate) fn encode_record(record: &Record) -> Result<EncodedRecord, CodecError> {
    Ok(EncodedRecord { op_id: record.operation.0, time_secs: record.at.unix(), bytes: encode(record)? })
}

/// A record from the journal's bytes.
pub(crate) fn decode_record(bytes: &[u8]) -> Result<Record, CodecError> {
    decode(bytes)
}

/// Any value in an envelope.
pub(crate) fn encode<T: Serialize>(body: &T) -> Result<Vec<u8>, CodecError> {
    let mut bytes = Vec::new();
    ciborium::into_writer(&Envelope { version: RECORD_VERSION, body }, &mut bytes)
        .map_err(CodecError::Encode)?;
    Ok(bytes)
}

/// Opens an envelope. The version is looked at before the body is understood.
pub(crate) fn decode<T: for<'de> Deserialize<'de>>(bytes: &[u8]) -> Result<T, CodecError> {
    #[derive(Deserialize)]
    struct VersionOnly {
        #[serde(rename = "v")]
        version: u32,
    }
    let VersionOnly { version } = ciborium::from_reader(bytes).map_err(CodecError::Decode)?;
    if version > RECORD_VERSION {
        return Err(CodecError::Version { found: version });
    }
    let envelope: Envelope<T> = ciborium::from_reader(bytes).map_err(CodecError::Decode)?;
    Ok(envelope.body)
}

#[cfg(test)]
mod tests {
    use super::*;
    use mesh_core::{Actor, Change, OperationId, UtcTime};

    #[test]
    fn a_record_reads_back_and_a_newer_one_is_named() {
        let record = Record {
            operation: OperationId([3; 16]),
            at: UtcTime::from_unix(1_795_363_200),
            actor: Actor::Controller,
            who: "controller".into(),
            action: "clock.hold".into(),
            changes: vec![Change::ClockHeld],
        };
        let encoded = encode_record(&record).unwrap();
        assert_eq!(encoded.op_id, [3; 16]);
        assert_eq!(encoded.time_secs, 1_795_363_200);
        assert_eq!(decode_record(&encoded.bytes).unwrap(), record);

        let mut newer = Vec::new();
        ciborium::into_writer(&Envelope { version: 9, body: "from the future" }, &mut newer).unwrap();
        assert!(matches!(decode_record(&newer), Err(CodecError::Version { found: 9 })));
        assert!(matches!(decode_record(b"\xff"), Err(CodecError::Decode(_))));
    }
}
