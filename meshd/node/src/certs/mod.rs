//! Certificates for the services on this host.

mod folder;
mod hook;
