//! `hostile-guest`: PID 1 of a virtual machine, in the agent's place. What it does is the word `hostile=…` of the kernel's
//! command line, which the kernel hands to PID 1 as an environment variable.

use std::io;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;

use hostile_guest::{Connection, Dial, behave};
use tokio_vsock::{VsockAddr, VsockStream};

/// vsock address of the host.
const HOST_CID: u32 = 2;

fn main() -> ExitCode {
    let name = std::env::var("hostile").unwrap_or_default();
    eprintln!("hostile-guest: {name}");
    let run = || -> io::Result<()> {
        if name == "floods-the-console" {
            std::thread::spawn(flood);
        }
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        runtime.block_on(behave(&name, vsock()))
    };
    if let Err(e) = run() {
        eprintln!("hostile-guest: {e}");
    }
    // A guest whose first process ends is reset.
    ExitCode::SUCCESS
}

fn vsock() -> Dial {
    Arc::new(|port| {
        Box::pin(async move {
            let stream = VsockStream::connect(VsockAddr::new(HOST_CID, port)).await?;
            Ok(Box::new(stream) as Box<dyn Connection>)
        })
    })
}

/// Writes to the machine's console for ever.
fn flood() -> io::Result<()> {
    use rustix::mount::{MountFlags, mount};
    // A kernel that has done it by itself says no.
    let _ = mount("devtmpfs", "/dev", "devtmpfs", MountFlags::NOSUID, None::<&std::ffi::CStr>);
    let mut console = std::fs::File::options().write(true).open(Path::new("/dev/console"))?;
    let line = [b"\x1b[2J\x07".repeat(700), b"\n".to_vec()].concat();
    loop {
        io::Write::write_all(&mut console, &line)?;
    }
}
