//! `nacelle volume`: directories that nacelle keeps for containers, by name.

use std::io;
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use nacelle_rootfs::volume::store::{Info, Store};
use serde_json::{Value, json};

use crate::units;

/// What to do with named volumes.
#[derive(clap::Subcommand)]
pub enum Command {
    /// Make an empty volume, for mounts of type nacelle.named to name
    Create {
        /// Its name: letters, digits, ".", "-" and "_", beginning with a letter or digit
        name: String,
    },
    /// List the volumes
    Ls {
        /// Print one JSON array instead of a table
        #[arg(long)]
        json: bool,
    },
    /// Show where a volume is, since when, and how much of the disk it takes
    Inspect {
        /// Its name
        name: String,
        /// Print one JSON object instead of lines
        #[arg(long)]
        json: bool,
    },
    /// Remove a volume with all that is in it, unless a container uses it
    Rm {
        /// Its name
        name: String,
    },
}

/// Does it.
pub fn run(command: &Command, data_dir: &Path, out: &mut impl io::Write) -> anyhow::Result<()> {
    let store = Store::new(data_dir);
    match command {
        Command::Create { name } => writeln!(out, "{}", store.create(name)?.display())?,
        Command::Ls { json } => list(&store.list()?, *json, out)?,
        Command::Inspect { name, json } => {
            let (info, bytes) = (store.inspect(name)?, store.bytes(name)?);
            inspect(&info, bytes, *json, out)?;
        }
        Command::Rm { name } => {
            store.remove(name)?;
            writeln!(out, "removed {name}")?;
        }
    }
    Ok(())
}

fn list(volumes: &[Info], json: bool, out: &mut impl io::Write) -> anyhow::Result<()> {
    if json {
        let rows: Vec<_> = volumes.iter().map(fields).collect();
        serde_json::to_writer_pretty(&mut *out, &rows)?;
        writeln!(out)?;
        return Ok(());
    }
    writeln!(out, "{:<24} {:<7} {:<20} PATH", "NAME", "IN USE", "CREATED")?;
    for info in volumes {
        let created = units::date(seconds(info.created));
        writeln!(out, "{:<24} {:<7} {created:<20} {}", info.name, yes(info.in_use), info.path.display())?;
    }
    Ok(())
}

fn inspect(info: &Info, bytes: u64, json: bool, out: &mut impl io::Write) -> anyhow::Result<()> {
    if json {
        let mut all = fields(info);
        all["bytes"] = bytes.into();
        serde_json::to_writer_pretty(&mut *out, &all)?;
        writeln!(out)?;
        return Ok(());
    }
    writeln!(out, "name     {}", info.name)?;
    writeln!(out, "path     {}", info.path.display())?;
    writeln!(out, "created  {}", units::date(seconds(info.created)))?;
    writeln!(out, "in use   {}", yes(info.in_use))?;
    writeln!(out, "size     {}", units::bytes(bytes))?;
    Ok(())
}

fn fields(info: &Info) -> Value {
    json!({ "name": info.name, "path": info.path, "created": seconds(info.created), "in_use": info.in_use })
}

/// Since 1970; a clock before that counts as its beginning.
fn seconds(time: SystemTime) -> u64 {
    time.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}

fn yes(is: bool) -> &'static str {
    if is { "yes" } else { "no" }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn volumes_are_made_shown_and_removed() {
        let dir = tempfile::tempdir().unwrap();
        let said = |command| {
            let mut out = Vec::new();
            run(&command, dir.path(), &mut out).map(|()| String::from_utf8(out).unwrap())
        };
        let name = || "cache_1".to_owned();
        assert_eq!(said(Command::Ls { json: true }).unwrap(), "[]\n");
        let path = said(Command::Create { name: name() }).unwrap();
        assert!(path.ends_with("/volumes/cache_1/data\n"), "{path}");
        let table = said(Command::Ls { json: false }).unwrap();
        assert!(table.lines().nth(1).unwrap().starts_with("cache_1                  no      20"), "{table}");
        let list: Value = serde_json::from_str(&said(Command::Ls { json: true }).unwrap()).unwrap();
        assert_eq!(list[0]["name"], "cache_1");
        assert_eq!(list[0]["in_use"], false);
        let shown = said(Command::Inspect { name: name(), json: false }).unwrap();
        assert!(shown.starts_with("name     cache_1\npath     /") && shown.contains("\nsize     "), "{shown}");
        let held = Store::new(dir.path()).hold("cache_1").unwrap();
        let shown = said(Command::Inspect { name: name(), json: true }).unwrap();
        let shown: Value = serde_json::from_str(&shown).unwrap();
        assert!(shown["bytes"].is_u64() && shown["created"].as_u64() > Some(1_600_000_000), "{shown}");
        assert_eq!(shown["in_use"], true);
        let error = said(Command::Rm { name: name() }).unwrap_err();
        assert_eq!(error.to_string(), "remove volume \"cache_1\": it is in use");
        drop(held);
        assert_eq!(said(Command::Rm { name: name() }).unwrap(), "removed cache_1\n");
        let error = said(Command::Inspect { name: name(), json: false }).unwrap_err();
        assert!(error.to_string().starts_with("volume \"cache_1\" does not exist; make it with"), "{error}");
        let error = said(Command::Create { name: "../x".into() }).unwrap_err();
        assert!(error.to_string().starts_with("volume name \"../x\""), "{error}");
    }
}
