//! The last map and CRLs: what the node starts from before it has dialled anybody.

use mesh_proto::v1 as pb;
use prost::Message as _;
use serde::{Deserialize, Serialize};

use super::{StateDir, StateError};

const MAP_FILE: &str = "map.bin";
const CRLS_FILE: &str = "crls.bin";
const FLOOR_FILE: &str = "floor.json";
const ENDPOINTS_FILE: &str = "endpoints.bin";

/// The newest that was ever stored. An older map or CRL put in the place of a newer one is refused.
#[derive(Serialize, Deserialize, Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Floor {
    pub(crate) journal_id: String,
    pub(crate) incarnation: u32,
    pub(crate) seq: u64,
}

impl Floor {
    pub(crate) fn of(cursor: &pb::Cursor) -> Self {
        Self { journal_id: hex::encode(&cursor.journal_id), incarnation: cursor.incarnation, seq: cursor.seq }
    }

    /// Whether `cursor` is older than what was seen. Another journal or a later incarnation (a restore)
    /// counts anew.
    pub(crate) fn is_above(&self, cursor: &pb::Cursor) -> bool {
        let other = Self::of(cursor);
        self.journal_id == other.journal_id
            && (other.incarnation, other.seq) < (self.incarnation, self.seq)
            && other.incarnation <= self.incarnation
    }
}

impl StateDir {
    /// The last map; `None` if there is none, or it cannot be read as one.
    pub(crate) fn map(&self) -> Result<Option<pb::Full>, StateError> {
        let Some(bytes) = self.read(MAP_FILE)? else { return Ok(None) };
        let map = pb::Full::decode(bytes.as_slice()).map_err(|error| StateError::Corrupt {
            path: self.path().join(MAP_FILE),
            what: error.to_string(),
        })?;
        Ok(Some(map))
    }

    /// Stores the map, then raises the floor: a crash in between leaves a floor that is too low, never a
    /// map below it.
    pub(crate) fn save_map(&self, map: &pb::Full) -> Result<(), StateError> {
        self.write(MAP_FILE, &map.encode_to_vec())?;
        match &map.cursor {
            Some(cursor) => self.write_json(FLOOR_FILE, &Floor::of(cursor)),
            None => Ok(()),
        }
    }

    pub(crate) fn floor(&self) -> Result<Floor, StateError> {
        Ok(self.read_json(FLOOR_FILE)?.unwrap_or_default())
    }

    pub(crate) fn crls(&self) -> Result<Vec<pb::Crl>, StateError> {
        let Some(bytes) = self.read(CRLS_FILE)? else { return Ok(Vec::new()) };
        let response = pb::CrlsResponse::decode(bytes.as_slice()).map_err(|error| StateError::Corrupt {
            path: self.path().join(CRLS_FILE),
            what: error.to_string(),
        })?;
        Ok(response.crls)
    }

    pub(crate) fn save_crls(&self, crls: &[pb::Crl]) -> Result<(), StateError> {
        let response = pb::CrlsResponse { crls: crls.to_vec(), ocsp: Vec::new() };
        self.write(CRLS_FILE, &response.encode_to_vec())
    }

    /// Where the peers could be reached last.
    pub(crate) fn endpoints(&self) -> Result<pb::Hints, StateError> {
        let bytes = self.read(ENDPOINTS_FILE)?.unwrap_or_default();
        pb::Hints::decode(bytes.as_slice()).map_err(|error| StateError::Corrupt {
            path: self.path().join(ENDPOINTS_FILE),
            what: error.to_string(),
        })
    }

    pub(crate) fn save_endpoints(&self, hints: &pb::Hints) -> Result<(), StateError> {
        self.write(ENDPOINTS_FILE, &hints.encode_to_vec())
    }

    pub(super) fn forget_map(&self) -> Result<(), StateError> {
        for name in [MAP_FILE, FLOOR_FILE, CRLS_FILE, ENDPOINTS_FILE] {
            self.remove(name)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cursor(incarnation: u32, seq: u64) -> pb::Cursor {
        pb::Cursor { journal_id: vec![1; 16].into(), incarnation, seq, hash8: vec![0; 8].into() }
    }

    #[test]
    fn the_floor_refuses_what_is_older_and_nothing_else() {
        let floor = Floor::of(&cursor(2, 10));
        let table = [((2, 9), true), ((2, 10), false), ((2, 11), false), ((1, 99), true), ((3, 1), false)];
        for ((incarnation, seq), above) in table {
            assert_eq!(floor.is_above(&cursor(incarnation, seq)), above, "{incarnation}/{seq}");
        }
        let foreign = pb::Cursor { journal_id: vec![2; 16].into(), ..cursor(2, 1) };
        assert!(!floor.is_above(&foreign));
    }
}
