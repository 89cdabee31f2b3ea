//! Helpers that the end-to-end tests share: a containerd of their own, the `ctr` commands and API calls that drive it,
//! and the search for what a test left behind. Nothing here knows how nacelle works inside.

pub mod command;
pub mod events;
pub mod grpc;
pub mod lan;
pub mod leftovers;
pub mod node;
pub mod shim;
