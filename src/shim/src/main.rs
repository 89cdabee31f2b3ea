//! `containerd-shim-nacelle-v2`: one program for all that containerd asks of a shim.

use std::io::Write;
use std::process::ExitCode;

use anyhow::bail;
use nacelle_shim::args::Args;
use nacelle_shim::{delete, info, server, start};

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("containerd-shim-nacelle-v2: {e:#}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> anyhow::Result<()> {
    let args = Args::parse(std::env::args().skip(1))?;
    if args.version {
        println!(
            "containerd-shim-nacelle-v2 {} (containerd runtime io.containerd.nacelle.v2)",
            env!("CARGO_PKG_VERSION")
        );
        return Ok(());
    }
    let reply = match args.action.as_str() {
        _ if args.info => info::runtime_info(&start::read_stdin()?)?,
        "start" => start::run(&args)?,
        "delete" => delete::run(&args)?,
        "serve" => return server::run(&args),
        other => bail!("run action {other:?}: containerd calls start and delete; people may want -v or -info"),
    };
    std::io::stdout().write_all(&reply)?;
    Ok(())
}
