//! The controller over loopback: real TLS, real gRPC, real journal, one process.

mod agreement;
mod clocks;
mod enrollment;
mod harness;
mod imports;
mod journal;
mod key_types;
mod metrics;
mod ocsp;
mod operators;
mod partitions;
mod posing;
mod profiles;
mod publishing;
mod relay;
mod restore;
mod revocation;
mod rotation;
mod startup;
mod sync;
mod tls;
