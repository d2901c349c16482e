//! Extensions that rcgen cannot write.

use der::Encode as _;
use der::asn1::{AnyRef, ContextSpecificRef, ObjectIdentifier};
use der::{Tag, TagMode, TagNumber};

use crate::pointers::Pointers;

/// authorityInfoAccess, RFC 5280 §4.2.2.1.
pub(crate) const AUTHORITY_INFO_ACCESS: &str = "1.3.6.1.5.5.7.1.1";

/// noRevAvail, RFC 9608 §2.
pub(crate) const NO_REV_AVAIL: &str = "2.5.29.56";

/// id-pkix-ocsp-nocheck, RFC 6960 §4.2.2.2.1.
pub(crate) const OCSP_NO_CHECK: &str = "1.3.6.1.5.5.7.48.1.5";

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
