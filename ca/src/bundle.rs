//! Certificates and CRLs in PEM files.

use rustls_pki_types::CertificateDer;

/// Largest PEM file, in bytes: a CRL's DER limit and its base64.
pub const PEM_BYTES_MAX: usize = 8 * 1024 * 1024;

/// Most blocks in one file.
pub const PEM_BLOCKS_MAX: usize = 64;

const CERTIFICATE_LABEL: &str = "CERTIFICATE";
const CRL_LABEL: &str = "X509 CRL";

/// Why a PEM file is not taken.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BundleError {
    #[error("PEM file is {0} bytes long, at most {PEM_BYTES_MAX} are allowed")]
    TooLarge(usize),
    #[error("PEM file is malformed")]
    Malformed,
    #[error("PEM file holds more than {PEM_BLOCKS_MAX} blocks")]
    TooManyBlocks,
    #[error("PEM file holds a block {found:?} where {wanted:?} belongs")]
    Label { found: String, wanted: &'static str },
    #[error("PEM file holds no {0:?} block")]
    Empty(&'static str),
}

/// The DER of each certificate of a PEM file, in order; at least one, and nothing else beside.
pub fn parse_certificates(text: &[u8]) -> Result<Vec<CertificateDer<'static>>, BundleError> {
    Ok(parse(text, CERTIFICATE_LABEL)?.into_iter().map(CertificateDer::from).collect())
}

/// The DER of each CRL of a PEM file, in order; at least one, and nothing else beside.
pub fn parse_crls(text: &[u8]) -> Result<Vec<Vec<u8>>, BundleError> {
    parse(text, CRL_LABEL)
}

/// Certificates as a PEM file, in order: a chain is written leaf first.
pub fn encode_certificates<D: AsRef<[u8]>>(ders: impl IntoIterator<Item = D>) -> String {
    encode(ders, CERTIFICATE_LABEL)
}

/// CRLs as a PEM file.
pub fn encode_crls<D: AsRef<[u8]>>(ders: impl IntoIterator<Item = D>) -> String {
    encode(ders, CRL_LABEL)
}

fn parse(text: &[u8], label: &'static str) -> Result<Vec<Vec<u8>>, BundleError> {
    if text.len() > PEM_BYTES_MAX {
        return Err(BundleError::TooLarge(text.len()));
    }
    let blocks = pem::parse_many(text).map_err(|_| BundleError::Malformed)?;
    if blocks.len() > PEM_BLOCKS_MAX {
        return Err(BundleError::TooManyBlocks);
    }
    if let Some(other) = blocks.iter().find(|block| block.tag() != label) {
        return Err(BundleError::Label { found: other.tag().to_owned(), wanted: label });
    }
    if blocks.is_empty() {
        return Err(BundleError::Empty(label));
    }
    Ok(blocks.into_iter().map(pem::Pem::into_contents).collect())
}

fn encode<D: AsRef<[u8]>>(ders: impl IntoIterator<Item = D>, label: &str) -> String {
    let config = pem::EncodeConfig::new().set_line_ending(pem::LineEnding::LF);
    ders.into_iter().map(|der| pem::encode_config(&pem::Pem::new(label, der.as_ref()), config)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn bundles_read_back_in_order() {
        let text = encode_certificates([b"leaf".as_slice(), b"issuing"]);
        let ders = parse_certificates(text.as_bytes()).unwrap();
        assert_eq!(ders.iter().map(|der| der.as_ref()).collect::<Vec<_>>(), [b"leaf".as_slice(), b"issuing"]);
        let text = encode_crls([b"one"]);
        assert_eq!(parse_crls(text.as_bytes()), Ok(vec![b"one".to_vec()]));
    }

    #[test]
    fn other_files_are_refused() {
        assert_eq!(parse_certificates(b""), Err(BundleError::Empty("CERTIFICATE")));
        assert_eq!(
            parse_certificates(&vec![b'x'; PEM_BYTES_MAX + 1]),
            Err(BundleError::TooLarge(PEM_BYTES_MAX + 1))
        );
        let crl = encode_crls([b"one"]);
        let found = "X509 CRL".to_owned();
        assert_eq!(
            parse_certificates(crl.as_bytes()),
            Err(BundleError::Label { found, wanted: "CERTIFICATE" })
        );
        let many = encode_certificates(vec![b"x"; PEM_BLOCKS_MAX + 1]);
        assert_eq!(parse_certificates(many.as_bytes()), Err(BundleError::TooManyBlocks));
        let cut = &encode_certificates([b"leaf"])[..40];
        assert!(parse_certificates(cut.as_bytes()).is_err());
    }

    proptest! {
        /// Whatever stands in a file, reading it ends; and what it gives says the same when it is written again.
        #[test]
        fn what_is_read_is_read_again(text in proptest::collection::vec(any::<u8>(), 1..500)) {
            let block = [b"-----BEGIN CERTIFICATE-----\n", text.as_slice(), b"\n-----END CERTIFICATE-----\n"].concat();
            let good = encode_certificates([&text]).into_bytes();
            for file in [&text, &block, &good] {
                if let Ok(certificates) = parse_certificates(file) {
                    let again = encode_certificates(&certificates);
                    prop_assert_eq!(parse_certificates(again.as_bytes()).unwrap(), certificates);
                }
            }
            let read = parse_certificates(&good).unwrap();
            prop_assert_eq!(read[0].as_ref(), text.as_slice());
        }
    }
}
