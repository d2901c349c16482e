//! What the journal still says about records that World has folded away.

use std::fmt;
use std::sync::Arc;

use mesh_core::{CertificateRecord, Change, Record, Serial, UtcTime};
use mesh_store::{JournalReader, StoredRecord};

use crate::codec::decode_record;
use crate::status::Problem;

/// Reads old records. Blocks: call it on the blocking pool.
#[derive(Clone)]
pub(crate) struct Archive(Arc<dyn JournalReader>);

impl fmt::Debug for Archive {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Archive")
    }
}

impl Archive {
    pub(crate) fn new(reader: Box<dyn JournalReader>) -> Self {
        Self(reader.into())
    }

    /// The journal itself.
    pub(crate) fn reader(&self) -> &dyn JournalReader {
        &*self.0
    }

    /// The record at `seq`, as stored and as understood; `None` if there is none, or none any more.
    pub(crate) fn record(&self, seq: u64) -> Result<Option<(StoredRecord, Record)>, Problem> {
        let stored = self.0.record(seq);
        let stored = stored.map_err(|error| Problem::internal_error("cannot read the journal", &error))?;
        let Some(stored) = stored else { return Ok(None) };
        let record = decode_record(&stored.bytes)
            .map_err(|error| Problem::internal_error("cannot read a record", &error))?;
        Ok(Some((stored, record)))
    }

    /// The certificate that the record at `seq` issued under `serial`.
    pub(crate) fn certificate(
        &self,
        seq: u64,
        serial: &Serial,
    ) -> Result<Option<CertificateRecord>, Problem> {
        let found = self.record(seq)?.and_then(|(_, record)| {
            let mut certificates = record.changes.iter().filter_map(issued);
            certificates.find(|certificate| certificate.serial == *serial).cloned()
        });
        Ok(found)
    }

    /// The first certificate that the record at `seq` issued.
    pub(crate) fn issued_at(&self, seq: u64) -> Result<Option<CertificateRecord>, Problem> {
        Ok(self.record(seq)?.and_then(|(_, record)| record.changes.iter().find_map(issued).cloned()))
    }

    /// The first record made at or after `since`; past the head if there is none. Times never fall from record to
    /// record, so a few look-ups find it.
    pub(crate) fn first_since(&self, since: UtcTime) -> Result<u64, Problem> {
        let (mut low, mut high) = (self.0.base().seq + 1, self.0.head().seq + 1);
        while low < high {
            let middle = low + (high - low) / 2;
            let stored = self.0.read(middle).next().transpose();
            let stored =
                stored.map_err(|error| Problem::internal_error("cannot read the journal", &error))?;
            match stored {
                Some(stored) if stored.time_secs < since.unix() => low = middle + 1,
                _ => high = middle,
            }
        }
        Ok(low)
    }

    /// First octets of the hash at `seq`: what a cursor carries.
    pub(crate) fn hash8(&self, seq: u64) -> Result<Option<[u8; 8]>, Problem> {
        let hash = self
            .0
            .hash_at(seq)
            .map_err(|error| Problem::internal_error("cannot read the journal", &error))?;
        Ok(hash.and_then(|hash| hash.first_chunk().copied()))
    }
}

/// The certificate in a change that issues one.
pub(crate) fn issued(change: &Change) -> Option<&CertificateRecord> {
    match change {
        Change::ControllerCertified { certificate }
        | Change::ResponderCertified { certificate }
        | Change::NodeEnrolled { certificate, .. }
        | Change::IdentityRenewed { certificate, .. }
        | Change::CertificateIssued { certificate } => Some(certificate),
        _ => None,
    }
}
