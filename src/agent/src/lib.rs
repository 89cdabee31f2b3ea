//! The agent: PID 1 of a pod's microVM, and everything that runs inside it.
//!
//! ```text
//!                      ┌ init ─ file systems, cgroups, loopback; plain code, before any runtime
//!  main ── PID 1 ──────┤
//!                      └ serve ─ ttrpc on the one connection that the guest dialled
//!                          ├ guest ── create, exec, control    what containerd's Task service asks for
//!                          │    ├ task      one container and its processes: pure state
//!                          │    ├ spec      what libcontainer gets to see of an OCI configuration
//!                          │    ├ mount     lowers (EROFS) and the overlay over them; verity checks lowers as they are read
//!                          │    ├ disk      disks that are volumes or roots
//!                          │    ├ export    what a container has written, to the host
//!                          │    ├ files     its files as it runs, for the host to look into and to change
//!                          │    ├ mirror    copies of volumes whose changes a watcher must hear of
//!                          │    ├ cgroup, limits, stats
//!                          │    ├ pod       the PID namespace that containers may share
//!                          │    ├ users     the user namespace that they are in, where the pod has one
//!                          │    └ stdio     pipes and terminals ⇄ frames on vsock
//!                          ├ reap, events   every exit once, in order
//!                          └ clock
//!  main ── "runner" ───── runner, executor ─ one libcontainer operation in a process of its own, then exit
//!  main ── "files" ────── files ─ serves FUSE messages, in a container's root
//! ```
//!
//! One thread serves; others exist only while file systems are mounted, removed or exported. libcontainer clones, changes
//! directories and resource limits, so it never runs in the server: the agent executes itself again as a *runner*.
//!
//! The agent trusts the host and no container. It knows nothing of containerd's daemon, of images, of the layer cache,
//! of libkrun, nor of any path on the host.

pub mod cgroup;
pub mod clock;
pub mod console;
pub mod control;
pub mod cpus;
pub mod create;
pub mod dial;
pub mod disk;
pub mod events;
pub mod exec;
pub mod executor;
pub mod export;
pub mod fd;
pub mod features;
pub mod files;
pub mod forward;
pub mod frame;
pub mod guest;
pub mod init;
pub mod limits;
pub mod mirror;
pub mod mount;
pub mod network;
pub mod pod;
pub mod quota;
pub mod reap;
pub mod runner;
pub mod serve;
pub mod service;
pub mod spawn;
pub mod spec;
pub mod stats;
pub mod stdio;
pub mod task;
pub mod terminal;
pub mod users;
pub mod verity;
