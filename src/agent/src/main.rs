//! nacelle-agent: PID 1 of a guest, or a runner that it started.

use std::path::Path;
use std::process::ExitCode;

use nacelle_agent::console::chain;
use nacelle_agent::guest::Guest;
use nacelle_agent::{dial, files, init, pod, runner, say, serve, users};

fn main() -> ExitCode {
    let mut args = std::env::args_os();
    let name = args.next().unwrap_or_default();
    if name == runner::NAME {
        return runner::main(args.next().as_deref().map(Path::new));
    }
    if name == pod::MAKER {
        return pod::maker(args.next().as_deref().map(Path::new));
    }
    if name == pod::PAUSE {
        return pod::pause();
    }
    if name == users::MAKER {
        return users::maker();
    }
    if name == files::NAME {
        return files::main();
    }
    if std::process::id() != 1 {
        say!("this is the first process of a guest, and of no use elsewhere");
        return ExitCode::FAILURE;
    }
    if let Err(error) = live() {
        say!("{}", chain(error.as_ref()));
    }
    init::reset()
}

fn live() -> Result<(), Box<dyn std::error::Error>> {
    init::boot()?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().max_blocking_threads(4).build()?;
    Ok(runtime.block_on(serve::run(Guest::new(dial::vsock(), init::PROGRAM.into())))?)
}
