//! The authority seen from outside: whole issuances, chains, CRLs and handshakes.

mod authority;

mod chains;
mod crls;
mod csrs;
mod hostile;
mod issuing;
mod lints;
mod tls;
