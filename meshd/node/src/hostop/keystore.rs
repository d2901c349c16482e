//! A pair as PKCS #12, for programs that read no PEM: Java before all.

use std::io::{self, Read as _};
use std::path::PathBuf;

use mesh_ca::Pkcs12Error;
use rustls_pki_types::CertificateDer;
use zeroize::Zeroizing;

use crate::limits::PASSPHRASE_BYTES_MAX;

/// What a `cert.p12` is made of.
#[derive(Clone)]
pub(crate) struct KeyStoreOrder {
    /// The name under which Java finds the key.
    pub(crate) alias: String,
    /// Its first line is the passphrase.
    pub(crate) passphrase_file: PathBuf,
    /// PKCS #8 DER.
    pub(crate) key: Zeroizing<Vec<u8>>,
    /// Leaf first, then the issuing CA.
    pub(crate) chain: Vec<CertificateDer<'static>>,
}

#[derive(Debug, thiserror::Error)]
pub(crate) enum KeyStoreError {
    #[error("cannot read the passphrase file {path}")]
    Read {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error(
        "first line of the passphrase file {path} is empty, no UTF-8, or longer than {PASSPHRASE_BYTES_MAX} bytes"
    )]
    Passphrase { path: PathBuf },
    #[error("PKCS #12 file cannot be made")]
    Make(#[source] Pkcs12Error),
}

impl KeyStoreOrder {
    /// The file's content. Blocks for about half a second, as the derivation of its keys asks.
    pub(super) fn make(&self) -> Result<Zeroizing<Vec<u8>>, KeyStoreError> {
        let passphrase = self.passphrase()?;
        let mut rng = |bytes: &mut [u8]| {
            bytes.chunks_mut(16).for_each(|chunk| {
                chunk.copy_from_slice(&mesh_runtime::random_bytes::<16>()[..chunk.len()]);
            });
        };
        mesh_ca::write_pkcs12(&self.alias, &self.key, &self.chain, &passphrase, &mut rng)
            .map_err(KeyStoreError::Make)
    }

    fn passphrase(&self) -> Result<Zeroizing<String>, KeyStoreError> {
        let path = || self.passphrase_file.clone();
        let failed = |source| KeyStoreError::Read { path: path(), source };
        let room = PASSPHRASE_BYTES_MAX + 1;
        let mut bytes = Zeroizing::new(Vec::with_capacity(room));
        let file = std::fs::File::open(&self.passphrase_file).map_err(failed)?;
        file.take(room as u64).read_to_end(&mut bytes).map_err(failed)?;
        let end = bytes.iter().position(|byte| *byte == b'\n').unwrap_or(bytes.len());
        let line = bytes[..end].strip_suffix(b"\r").unwrap_or(&bytes[..end]);
        match std::str::from_utf8(line) {
            Ok(line) if (1..=PASSPHRASE_BYTES_MAX).contains(&line.len()) => {
                Ok(Zeroizing::new(line.to_owned()))
            }
            _ => Err(KeyStoreError::Passphrase { path: path() }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_passphrase_file_without_a_passphrase_is_refused_by_name() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("passphrase");
        let order = KeyStoreOrder {
            alias: "api".to_owned(),
            passphrase_file: path.clone(),
            key: Zeroizing::new(vec![0x30, 0]),
            chain: vec![CertificateDer::from(vec![0x30, 0])],
        };
        assert!(matches!(order.make(), Err(KeyStoreError::Read { path: named, .. }) if named == path));
        for bad in [&b""[..], b"\nsecond", b"\xff\n", &[b'x'; PASSPHRASE_BYTES_MAX + 1]] {
            std::fs::write(&path, bad).unwrap();
            assert!(matches!(order.make(), Err(KeyStoreError::Passphrase { path: named }) if named == path));
        }
        std::fs::write(&path, "secret\r\n").unwrap();
        let made = order.make().unwrap();
        assert_eq!(mesh_ca::read_pkcs12(&made, "secret").unwrap().pkcs8.as_slice(), [0x30, 0]);
    }
}
