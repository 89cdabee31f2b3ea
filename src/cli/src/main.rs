//! `nacelle`, for people: can this node run nacelle, what is running, what is in the layer cache
//! or in an image?
//!
//! It reads files that the shim leaves for it and works on the layer cache through `nacelle-rootfs`; it speaks to no
//! running sandbox, so it needs no daemon and disturbs nothing.

mod build;
mod doctor;
mod image;
mod jail;
mod kernel;
mod layer;
mod patch;
mod progress;
mod ps;
mod units;
mod upper;
mod volume;

use std::{io, path::PathBuf, process::ExitCode};

use clap::{Parser, Subcommand};

#[derive(Parser)]
#[command(name = "nacelle", version, about = "Every pod in its own jailed microVM: the operator's tool")]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Check whether this node can run nacelle, and say what to do about what is missing
    Doctor {
        /// Print one JSON object instead of a table
        #[arg(long)]
        json: bool,
    },
    /// List the running sandboxes
    Ps {
        /// Show the phases of each start and the layers in use
        #[arg(long, short)]
        long: bool,
        /// Print one JSON array instead of a table
        #[arg(long)]
        json: bool,
        /// Where the shims keep their run directories
        #[arg(long, default_value = "/run/nacelle")]
        run_dir: PathBuf,
    },
    /// See what the VMMs of this node may reach
    Jail {
        #[command(subcommand)]
        command: jail::Command,
    },
    /// Look after the layer cache; make and look into layer images
    Layer {
        #[command(subcommand)]
        command: layer::Command,
        /// Where nacelle keeps its data, as `data_dir` in the configuration
        #[arg(long, default_value_os_t = layer::default_data_dir())]
        data_dir: PathBuf,
    },
    /// Check lists of patches to a root file system, or build what they come to
    Patch {
        #[command(subcommand)]
        command: patch::Command,
    },
    /// Make writable disks for containers
    Upper {
        #[command(subcommand)]
        command: upper::Command,
        /// Where nacelle keeps its data; templates are kept there
        #[arg(long, default_value_os_t = layer::default_data_dir())]
        data_dir: PathBuf,
    },
    /// Look after named volumes: directories that stay, and that containers may share
    Volume {
        #[command(subcommand)]
        command: volume::Command,
        /// Where nacelle keeps its data, as `data_dir` in the configuration
        #[arg(long, default_value_os_t = layer::default_data_dir())]
        data_dir: PathBuf,
    },
}

fn main() -> ExitCode {
    let result = match Arguments::parse().command {
        Command::Doctor { json } => doctor::run(json, &mut io::stdout().lock()),
        Command::Jail { command } => jail::run(&command, &mut io::stdout().lock()),
        Command::Layer { command, data_dir } => layer::run(command, &data_dir, &mut io::stdout().lock()),
        Command::Patch { command } => patch::run(&command, &mut io::stdout().lock()).map(|()| true),
        Command::Upper { command, data_dir } => {
            upper::run(&command, &data_dir, &mut io::stdout().lock()).map(|()| true)
        }
        Command::Volume { command, data_dir } => {
            volume::run(&command, &data_dir, &mut io::stdout().lock()).map(|()| true)
        }
        Command::Ps { long, json, run_dir } => ps::run(&run_dir, long, json, &mut io::stdout().lock()),
    };
    match result {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) if broken_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("nacelle: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Whoever reads our output may stop reading: `nacelle ps | head -1` is no error.
fn broken_pipe(error: &anyhow::Error) -> bool {
    error.chain().filter_map(|e| e.downcast_ref::<io::Error>()).any(|e| e.kind() == io::ErrorKind::BrokenPipe)
}
