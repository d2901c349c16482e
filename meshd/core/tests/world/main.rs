//! What commands do to a mesh, through the public API.

mod certificates;
mod enrollment;
mod fixture;
mod golden;
mod invariants;
mod lifecycle;
mod nodes;
mod operators;
mod policy;
mod profiles;
mod rotation;
mod shards;
mod view;
