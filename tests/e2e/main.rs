//! The product as its users run it: real processes, real TUN devices, real third-party programs.

mod authorities;
mod bad_input;
mod crash;
mod demo;
mod ends;
mod enrollment;
mod hardware;
mod host;
mod inventory;
mod judged;
mod lifetime;
mod mesh;
mod operations;
mod outage;
mod paths;
mod ping;
mod policy;
mod published;
mod revocation;
mod rotation;
mod services;
