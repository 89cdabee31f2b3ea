//! The smallest PID 1: one byte on the console, then the end of the machine. `bare_libkrun` boots it.

use std::io::{self, Write};

fn main() -> io::Result<()> {
    let mut console = io::stdout();
    console.write_all(b".")?;
    // The kernel of libkrunfw resets the machine when PID 1 ends; any other one panics first and then does so.
    console.flush()
}
