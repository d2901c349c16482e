//! Small pieces of DER that no structure of a library covers.

use der::asn1::{AnyRef, ObjectIdentifier};
use der::{Decode as _, Encode as _, Tag, TagNumber, Tagged as _};

/// `[0]` constructed: an explicit tag, or an implicit one on a constructed type.
pub(crate) const CONTEXT_0: Tag = Tag::ContextSpecific { constructed: true, number: TagNumber::N0 };

/// One element around `body`.
pub(crate) fn wrap(tag: Tag, body: &[u8]) -> der::Result<Vec<u8>> {
    AnyRef::new(tag, body)?.to_der()
}

/// A sequence of the elements `parts`.
pub(crate) fn sequence(parts: &[&[u8]]) -> der::Result<Vec<u8>> {
    wrap(Tag::Sequence, &parts.concat())
}

/// The content of the one element that `bytes` are, if it has this tag.
pub(crate) fn content(bytes: &[u8], tag: Tag) -> der::Result<&[u8]> {
    let any = AnyRef::from_der(bytes)?;
    any.tag().assert_eq(tag)?;
    Ok(any.value())
}

/// The elements, each with its header, that stand one after the other in `body`; at most `max`.
pub(crate) fn elements(body: &[u8], max: usize) -> der::Result<Vec<&[u8]>> {
    use der::Reader as _;
    let mut reader = der::SliceReader::new(body)?;
    let mut found = Vec::new();
    while !reader.is_finished() {
        if found.len() == max {
            return Err(der::ErrorKind::Overlength.into());
        }
        found.push(reader.tlv_bytes()?);
    }
    Ok(found)
}

/// The elements of the one sequence that `bytes` are.
pub(crate) fn parts(bytes: &[u8], max: usize) -> der::Result<Vec<&[u8]>> {
    elements(content(bytes, Tag::Sequence)?, max)
}

pub(crate) fn oid(bytes: &[u8]) -> der::Result<ObjectIdentifier> {
    ObjectIdentifier::from_der(bytes)
}
