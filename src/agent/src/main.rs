//! nacelle-agent: PID 1 of a guest, or a runner that it started.

use std::path::Path;
use std::process::ExitCode;

use nacelle_agent::console::chain;
use nacelle_agent::guest::Guest;
use nacelle_agent::{dial, init, runner, say, serve};

fn main() -> ExitCode {
    let mut args = std::env::args_os();
    if args.next().is_some_and(|name| name == runner::NAME) {
        return runner::main(args.next().as_deref().map(Path::new));
    }
    if std::process::id() != 1 {
        say!("this is the first process of a guest, and of no use elsewhere");
        return ExitCode::FAILURE;
    }
    match init::boot() {
        Ok(program) => {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().max_blocking_threads(4).build();
            match runtime {
                Ok(runtime) => {
                    let guest = Guest::new(dial::vsock(), program);
                    if let Err(error) = runtime.block_on(serve::run(guest)) {
                        say!("{}", chain(&error));
                    }
                }
                Err(error) => say!("start runtime: {error}"),
            }
        }
        Err(error) => say!("{}", chain(&error)),
    }
    init::reset()
}
