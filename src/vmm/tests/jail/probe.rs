//! What stands in for libkrun inside the jail: it enters as the VMM does, dials the test through the one socket that it
//! was given, and then does what the test says, one line a command.
//!
//! ```text
//!  command   words, with tabs between
//!  answer    "ok" TAB text      or "error" TAB the system's error number
//! ```

use std::fs::{self, File, OpenOptions};
use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::os::unix::net::UnixStream;

use nacelle_protocol::vm::VmConfig;
use nacelle_vmm::jail::{self, Descriptors};
use nacelle_vmm::plan::Plan;
use nacelle_vmm::{log, report};
use rustix::fs::{CWD, FileType, Mode, makedev, mknodat};
use rustix::thread::{Gid, Uid, set_thread_res_gid, set_thread_res_uid};

/// The port whose socket leads to the test.
pub const PORT: u32 = 1024;

/// Enters the jail and serves until the test hangs up.
pub fn run() -> ! {
    let Descriptors { config, report, lifeline, console } = Descriptors::inherited().expect("descriptors");
    log::init();
    report::init(report, jail::exit);
    let config: VmConfig = serde_json::from_reader(config).expect("configuration");
    let plan = Plan::new(&config).expect("plan");
    if let Err(error) = jail::enter(&plan, lifeline, &console) {
        report::send(&report::failed(error.stage, &error));
        jail::exit(report::EXIT_FAILED);
    }
    let control = UnixStream::connect(format!("/socket/{PORT}")).expect("dial the test");
    let mut answers = control.try_clone().expect("duplicate");
    for line in BufReader::new(control).lines() {
        let line = line.expect("command");
        let words: Vec<_> = line.split('\t').collect();
        let answer = match act(&words) {
            Ok(text) => format!("ok\t{}", text.escape_default()),
            Err(error) => format!("error\t{}", error.raw_os_error().unwrap_or(-1)),
        };
        writeln!(answers, "{answer}").expect("answer");
    }
    jail::exit(0)
}

fn act(words: &[&str]) -> io::Result<String> {
    let number = |text: &str| text.parse::<u32>().map_err(io::Error::other);
    Ok(match *words {
        ["read", path] => fs::read_to_string(path)?,
        ["write", path, text] => fs::write(path, text).map(|()| String::new())?,
        ["make-directory", path] => fs::create_dir(path).map(|()| String::new())?,
        ["remove", path] => fs::remove_file(path).map(|()| String::new())?,
        ["list", path] => {
            let names = fs::read_dir(path)?.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()));
            let mut names = names.collect::<io::Result<Vec<_>>>()?;
            names.sort();
            names.join(" ")
        }
        ["stat", path] => {
            let meta = fs::symlink_metadata(path)?;
            format!("{} {} {:o}", meta.uid(), meta.gid(), meta.permissions().mode() & 0o7777)
        }
        ["chown", path, uid, gid] => chown(path, Some(number(uid)?), Some(number(gid)?)).map(|()| String::new())?,
        ["chmod", path, mode] => {
            let mode = u32::from_str_radix(mode, 8).map_err(io::Error::other)?;
            fs::set_permissions(path, fs::Permissions::from_mode(mode)).map(|()| String::new())?
        }
        // As libkrun creates a file for a user of the guest's: effective ids of one thread, and back.
        ["create-as", uid, gid, path] => {
            set_thread_res_gid(None, Some(Gid::from_raw(number(gid)?)), None)?;
            let made = set_thread_res_uid(None, Some(Uid::from_raw(number(uid)?)), None)
                .map_err(io::Error::from)
                .and_then(|()| File::create_new(path));
            set_thread_res_uid(None, Some(Uid::ROOT), None)?;
            set_thread_res_gid(None, Some(Gid::ROOT), None)?;
            made.map(|_| String::new())?
        }
        ["make-device", path] => {
            mknodat(CWD, path, FileType::CharacterDevice, Mode::RUSR, makedev(1, 3)).map(|()| String::new())?
        }
        ["open-device", path] => OpenOptions::new().read(true).write(true).open(path).map(|_| String::new())?,
        ["mount", path] => rustix::mount::mount("x", path, "tmpfs", rustix::mount::MountFlags::empty(), None)
            .map(|()| String::new())?,
        ["connect", path] => UnixStream::connect(path).map(|_| String::new())?,
        ["console", text] => {
            // As libkrun opens it.
            let mut console = File::create("/proc/self/fd/6")?;
            console.write_all(text.as_bytes()).map(|()| String::new())?
        }
        ["environment"] => {
            std::env::vars().map(|(name, value)| format!("{name}={value}")).collect::<Vec<_>>().join(" ")
        }
        ["pid"] => std::process::id().to_string(),
        ["panic"] => panic!("as told"),
        _ => return Err(io::Error::other("unknown command")),
    })
}
