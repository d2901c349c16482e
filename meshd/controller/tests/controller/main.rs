//! The controller over loopback: real TLS, real gRPC, real journal, one process.

mod enrollment;
mod harness;
