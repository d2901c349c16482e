//! The wire schema of meshd, generated from `mesh/v1/*.proto`; how a command ends at each of its errors, and
//! how entries of the peer map are read.
#![forbid(unsafe_code)]

mod entries;
mod exit;

pub use exit::Exit;

/// Messages, clients and servers of package `mesh.v1`.
#[allow(missing_debug_implementations, clippy::all, unreachable_pub)]
pub mod v1 {
    tonic::include_proto!("mesh.v1");
}

/// The compiled schema as an encoded `google.protobuf.FileDescriptorSet`.
pub const FILE_DESCRIPTOR_SET: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptors.bin"));
