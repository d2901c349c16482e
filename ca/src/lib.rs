//! The certificate authority of a mesh, without effects: names, profiles, CSRs, issuing, CRLs, chains.
//!
//! Nothing here opens a file or a socket, reads a clock or the environment. Times arrive as
//! [`time::UtcDateTime`] and are used in whole seconds; random bytes arrive through a caller's
//! `&mut dyn FnMut(&mut [u8])`, which must fill the whole slice from a CSPRNG. The one exception is
//! aws-lc, which draws key pairs and ECDSA nonces from its own generator.
//!
//! The path of an issuance, always in this order: [`Csr::parse`] → [`Csr::verify`] → a
//! [`LeafTemplate`] from the identity record and the profile → [`LeafTemplate::check`] → a
//! [`SerialNumber`] → [`issue_leaf`] (sign, read back, lint).

#![forbid(unsafe_code)]

mod asn1;
mod identity;
mod instant;
mod profile;
mod serial;

mod archive;
mod key;
mod keystore;
mod pkcs12;
mod private;
mod seal;

mod csr;
mod extension;
mod pointers;
mod template;
mod wireguard;

mod ceremony;
mod hierarchy;
mod import;
mod issue;
mod lint;
mod spec;

mod crl;
mod ocsp;
mod reason;

mod chain;
mod leaf;
mod succession;
mod tls;

pub mod bundle;

pub use archive::{
    ARCHIVE_CHUNK_BYTES, ARCHIVE_HEADER_BYTES, ARCHIVE_TAG_BYTES, ArchiveOpener, ArchiveSealer,
};
pub use ceremony::{CEREMONY_BYTES_MAX, CeremonyError, IssuerRequest, SignedIssuer, sign_issuer};
pub use chain::{
    CHAIN_LENGTH_MAX, CRLS_MAX, ChainError, ExpiredCrl, RevocationList, RevocationLists, TrustAnchors, Usage,
    Verified, verify_chain, verify_chain_expired_ok,
};
pub use crl::{
    CRL_BYTES_MAX, CRL_LIFETIME, Crl, CrlError, CrlPlan, CrlScope, ROOT_CRL_LIFETIME, RevokedEntry,
    build_crl, stays_listed,
};
pub use csr::{CSR_BYTES_MAX, Csr, CsrError, RequestedNames, SANS_PER_CSR_MAX, VerifiedCsr};
pub use hierarchy::{
    CaCertificate, CaNaming, ISSUING_CA_LIFETIME, ROOT_LIFETIME, create_issuing_ca, create_issuing_ca_for,
    create_root, cross_sign,
};
pub use identity::{DnsName, Identity, Label, NameError, TrustDomain};
pub use import::{ImportError, ImportedCa, check_ca, import_ca};
pub use instant::CLOCK_SKEW_ALLOWANCE;
pub use issue::{IssueError, IssuedCertificate, Issuer, SubjectKey, issue_leaf};
pub use key::{CaKeyType, KeyAlgorithm, KeyError, PublicKey, UnknownCaKeyType, UnknownKeyAlgorithm};
pub use keystore::{KeyId, KeyStore, KeyStoreError, MemoryKeyStore};
pub use leaf::{ClassifyError, KeyIdentifier, VerifiedLeaf, classify};
pub use lint::{CERT_BYTES_MAX, Finding, lint_ca, lint_crl, lint_leaf, lint_ocsp_responder};
pub use ocsp::{
    CertIdHash, NONCE_BYTES_MAX, OCSP_REQUEST_BYTES_MAX, OCSP_RESPONDER_LIFETIME, OCSP_RESPONSE_BYTES_MAX,
    OCSP_RESPONSE_LIFETIME, OcspAnswer, OcspError, OcspFailure, OcspIssuer, OcspQuery, OcspRequestError,
    OcspResponder, OcspResponseError, OcspStatus, VerifiedOcspResponse, lint_ocsp_response,
    parse_ocsp_response,
};
pub use pkcs12::{PKCS12_BYTES_MAX, Pkcs12Contents, Pkcs12Error, read_pkcs12, write_pkcs12};
pub use pointers::{CRL_SHARDS_MAX, HttpUrl, Pointers, PublishingPoints, URL_BYTES_MAX, UrlError};
pub use private::LeafKey;
pub use profile::{ExtraUsage, LEAF_LIFETIME_MAX, Profile, UnknownProfile, UnknownUsage};
pub use reason::{RevocationReason, UnknownReason};
pub use seal::{KdfParams, KeyPurpose, SEALED_KEY_BYTES_MAX, SealError, Unlock, seal, unseal};
pub use serial::{SerialError, SerialNumber};
pub use spec::{
    AcceptedProfile, DNS_RULES_MAX, DnsRule, IpRule, KeyFamily, NameGrant, NameOwner, Placement, ProfileSpec,
    RequestRefusal, RevocationForm, SPEC_LIFETIME_MIN, ServiceKind, SpecError, SpecRequest, UnknownKeyFamily,
};
pub use succession::{
    LINEAGE_MAX, ca_key_identifier, check_cross, is_signed_by, vouch_for_root, vouched_roots,
};
pub use template::{LeafTemplate, NO_REV_AVAIL_LIFETIME_MAX, SANS_PER_CERT_MAX, SubjectForm, TemplateError};
pub use tls::{AcceptedController, ClientVerifier, ControllerVerifier, PinnedControllerVerifier};
pub use wireguard::{WIREGUARD_KEYS_OID, WireguardKeysError};
