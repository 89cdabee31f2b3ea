//! Links the agent at a fixed address.
//!
//! It is executed for every container and every exec, and a program that can be loaded anywhere relocates itself each
//! time: some 28 000 words on as many pages as hold them, more than half of a runner's start. Nothing but the host and
//! the agent's own runners ever speaks to it, so a random address protects little.

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    let is = |name: &str, value: &str| std::env::var(name).is_ok_and(|set| set.split(',').any(|word| word == value));
    if is("CARGO_CFG_TARGET_ENV", "gnu") && is("CARGO_CFG_TARGET_FEATURE", "crt-static") {
        // The last word wins over rustc's -static-pie.
        println!("cargo::rustc-link-arg-bin=nacelle-agent=-no-pie");
        println!("cargo::rustc-link-arg-bin=nacelle-agent=-static");
    }
}
