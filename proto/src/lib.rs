//! The wire schema of meshd: generated from `mesh/v1/*.proto` and nothing else.
#![forbid(unsafe_code)]

/// Messages, clients and servers of package `mesh.v1`.
#[allow(missing_debug_implementations, clippy::all, unreachable_pub)]
pub mod v1 {
    tonic::include_proto!("mesh.v1");
}

/// The compiled schema as an encoded `google.protobuf.FileDescriptorSet`.
pub const FILE_DESCRIPTOR_SET: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptors.bin"));
