//! What the sandbox says → containerd's events, conformant to containerd's `api/events/task.proto`.

use containerd_shim_protos::events::task as wire;
use containerd_shim_protos::types::mount::Mount;
use protobuf::MessageField;

use crate::perform::Local;
use crate::publisher::{Event, timestamp};
use crate::sandbox::{Notice, ProcessKey};
use crate::stdio::Wanted;

fn exec_id(key: &ProcessKey) -> Option<String> {
    key.exec.as_ref().map(ToString::to_string)
}

/// Makes the event. `created` is the container that a [`Notice::Create`] is about.
pub fn event(notice: Notice, created: Option<(&Local, &Wanted)>) -> Event {
    match notice {
        Notice::Create { container, pid } => {
            let mut event = wire::TaskCreate { container_id: container.into(), pid, ..Default::default() };
            if let Some((local, io)) = created {
                event.bundle = local.bundle.display().to_string();
                event.rootfs = local.rootfs.iter().map(mount).collect();
                event.io = MessageField::some(wire::TaskIO {
                    stdin: io.stdin.clone(),
                    stdout: io.stdout.clone(),
                    stderr: io.stderr.clone(),
                    terminal: io.terminal,
                    ..Default::default()
                });
            }
            event.into()
        }
        Notice::Start { process, pid } => match exec_id(&process) {
            Some(exec_id) => {
                let container_id = process.container.into();
                wire::TaskExecStarted { container_id, exec_id, pid, ..Default::default() }.into()
            }
            None => wire::TaskStart { container_id: process.container.into(), pid, ..Default::default() }.into(),
        },
        Notice::ExecAdded { container, exec } => {
            wire::TaskExecAdded { container_id: container.into(), exec_id: exec.into(), ..Default::default() }.into()
        }
        Notice::Exit { process, pid, exit } => {
            let container_id = process.container.to_string();
            wire::TaskExit {
                id: exec_id(&process).unwrap_or_else(|| container_id.clone()),
                container_id,
                pid,
                exit_status: exit.status,
                exited_at: MessageField::some(timestamp(exit.at_ns)),
                ..Default::default()
            }
            .into()
        }
        Notice::Oom { container } => wire::TaskOOM { container_id: container.into(), ..Default::default() }.into(),
        Notice::Delete { container, pid, exit } => wire::TaskDelete {
            container_id: container.into(),
            pid,
            exit_status: exit.status,
            exited_at: MessageField::some(timestamp(exit.at_ns)),
            ..Default::default()
        }
        .into(),
        Notice::Paused { container } => {
            wire::TaskPaused { container_id: container.into(), ..Default::default() }.into()
        }
        Notice::Resumed { container } => {
            wire::TaskResumed { container_id: container.into(), ..Default::default() }.into()
        }
    }
}

fn mount(mount: &nacelle_rootfs::plan::Mount) -> Mount {
    Mount {
        type_: mount.kind.clone(),
        source: mount.source.clone(),
        target: mount.target.clone(),
        options: mount.options.clone(),
        ..Default::default()
    }
}
