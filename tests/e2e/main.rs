//! The product as its users run it: real processes, real TUN devices, real third-party programs.

mod mesh;
