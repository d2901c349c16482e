mod host;
mod namespaces;
mod netlink;
mod switch;

pub use host::Host;
pub use switch::Lab;
