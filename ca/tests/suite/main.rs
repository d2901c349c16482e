//! The authority seen from outside: whole issuances, chains, CRLs and handshakes.

mod authority;

mod ceremony;
mod chains;
mod checklist;
mod crls;
mod csrs;
mod hierarchy;
mod hostile;
mod imports;
mod issuing;
mod keys;
mod lints;
mod ocsp;
mod smuggling;
mod specs;
mod succession;
mod tls;
