//! Extensions that rcgen cannot write.

use der::Encode as _;
use der::asn1::{AnyRef, ContextSpecificRef, ObjectIdentifier};
use der::{Tag, TagMode, TagNumber};
use x509_parser::asn1_rs::oid;

use crate::pointers::Pointers;

// Object identifiers as they stand in DER, without tag and length: they are compared for every extension of every
// certificate. Sections are RFC 5280's unless said.

/// subjectKeyIdentifier, §4.2.1.2.
pub(crate) const SUBJECT_KEY_ID: &[u8] = &oid!(raw 2.5.29.14);
/// keyUsage, §4.2.1.3.
pub(crate) const KEY_USAGE: &[u8] = &oid!(raw 2.5.29.15);
/// subjectAltName, §4.2.1.6.
pub(crate) const SUBJECT_ALT_NAME: &[u8] = &oid!(raw 2.5.29.17);
/// basicConstraints, §4.2.1.9.
pub(crate) const BASIC_CONSTRAINTS: &[u8] = &oid!(raw 2.5.29.19);
/// cRLDistributionPoints, §4.2.1.13.
pub(crate) const CRL_DISTRIBUTION_POINTS: &[u8] = &oid!(raw 2.5.29.31);
/// authorityKeyIdentifier, §4.2.1.1.
pub(crate) const AUTHORITY_KEY_ID: &[u8] = &oid!(raw 2.5.29.35);
/// extKeyUsage, §4.2.1.12.
pub(crate) const EXTENDED_KEY_USAGE: &[u8] = &oid!(raw 2.5.29.37);
/// noRevAvail, RFC 9608 §2.
pub(crate) const NO_REV_AVAIL: &[u8] = &oid!(raw 2.5.29.56);
/// authorityInfoAccess, §4.2.2.1.
pub(crate) const AUTHORITY_INFO_ACCESS: &[u8] = &oid!(raw 1.3.6.1.5.5.7.1.1);
/// id-ad-ocsp, §4.2.2.1.
pub(crate) const ACCESS_OCSP: &[u8] = &oid!(raw 1.3.6.1.5.5.7.48.1);
/// id-ad-caIssuers, §4.2.2.1.
pub(crate) const ACCESS_CA_ISSUERS: &[u8] = &oid!(raw 1.3.6.1.5.5.7.48.2);
/// id-pkix-ocsp-nocheck, RFC 6960 §4.2.2.2.1.
pub(crate) const OCSP_NO_CHECK: &[u8] = &oid!(raw 1.3.6.1.5.5.7.48.1.5);

const ID_AD_OCSP: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.3.6.1.5.5.7.48.1");
const ID_AD_CA_ISSUERS: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.3.6.1.5.5.7.48.2");

/// Writes the pointers into a certificate's parameters.
pub(crate) fn add_pointers(params: &mut rcgen::CertificateParams, pointers: &Pointers) -> der::Result<()> {
    if let Some(url) = &pointers.crl {
        params.crl_distribution_points =
            vec![rcgen::CrlDistributionPoint { uris: vec![url.as_str().to_owned()] }];
    }
    if pointers.ocsp.is_some() || pointers.issuer.is_some() {
        let content = authority_info_access(pointers)?;
        let oid = [1, 3, 6, 1, 5, 5, 7, 1, 1];
        params.custom_extensions.push(rcgen::CustomExtension::from_oid_content(&oid, content));
    }
    Ok(())
}

/// Marks a certificate as one whose revocation is never told (RFC 9608 §2): NULL, non-critical.
pub(crate) fn add_no_rev_avail(params: &mut rcgen::CertificateParams) {
    params.custom_extensions.push(rcgen::CustomExtension::from_oid_content(&[2, 5, 29, 56], vec![5, 0]));
}

/// Marks an OCSP responder's certificate as one that is not itself checked (RFC 6960 §4.2.2.2.1): NULL, non-critical.
pub(crate) fn add_ocsp_no_check(params: &mut rcgen::CertificateParams) {
    let oid = [1, 3, 6, 1, 5, 5, 7, 48, 1, 5];
    params.custom_extensions.push(rcgen::CustomExtension::from_oid_content(&oid, vec![5, 0]));
}

/// `SEQUENCE OF SEQUENCE { accessMethod OBJECT IDENTIFIER, accessLocation [6] IA5String }`.
fn authority_info_access(pointers: &Pointers) -> der::Result<Vec<u8>> {
    let described = [(ID_AD_OCSP, &pointers.ocsp), (ID_AD_CA_ISSUERS, &pointers.issuer)];
    let mut body = Vec::new();
    for (method, url) in described {
        let Some(url) = url else { continue };
        let location = ContextSpecificRef {
            tag_number: TagNumber::N6,
            tag_mode: TagMode::Implicit,
            value: &der::asn1::Ia5StringRef::new(url.as_str())?,
        };
        let pair = [method.to_der()?, location.to_der()?].concat();
        body.extend(AnyRef::new(Tag::Sequence, &pair)?.to_der()?);
    }
    AnyRef::new(Tag::Sequence, &body)?.to_der()
}
