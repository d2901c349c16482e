//! What the store promises, on real files.

mod conformance;
mod cut;
mod damage;
mod faults;
mod golden;
mod index;
mod snapshots;
mod state;
mod support;
mod torn_tails;
