//! containerd's Task service ⇄ operations on the guest. No decisions: the only map from errors to codes.
//!
//! A request that takes long runs in a task of its own, because ttrpc drops the handler of a request whose deadline has
//! passed, and nothing may be left half done.

use std::future::Future;
use std::sync::Arc;

use async_trait::async_trait;
use containerd_shim_protos::api::{
    CheckpointTaskRequest, CloseIORequest, ConnectRequest, ConnectResponse, CreateTaskRequest, CreateTaskResponse,
    DeleteRequest, DeleteResponse, Empty, ExecProcessRequest, KillRequest, PauseRequest, PidsRequest, PidsResponse,
    ProcessInfo, ResizePtyRequest, ResumeRequest, ShutdownRequest, StartRequest, StartResponse, StateRequest,
    StateResponse, StatsRequest, StatsResponse, Status, UpdateTaskRequest, WaitRequest, WaitResponse,
};
use containerd_shim_protos::shim_async::Task;
use nacelle_protocol::agent::{CONTAINER_TYPE, MAX_PIDS};
use protobuf::well_known_types::any::Any;
use protobuf::well_known_types::timestamp::Timestamp;
use protobuf::{Message, MessageField};
use ttrpc::Code;
use ttrpc::r#async::TtrpcContext;

use crate::console::chain;
use crate::guest::{Guest, GuestError};
use crate::spawn::SpawnError;
use crate::stats::METRICS_TYPE;
use crate::stdio::{Names, StdioError};
use crate::task::Phase;

/// The Task service.
pub struct Tasks(pub Arc<Guest>);

/// An answer that says no.
pub fn rpc_status(code: Code, text: impl ToString) -> ttrpc::Error {
    ttrpc::Error::RpcStatus(ttrpc::get_status(code, text))
}

fn rpc_error(error: GuestError) -> ttrpc::Error {
    let code = match &error {
        GuestError::NotFound(_) => Code::NOT_FOUND,
        GuestError::Exists(_) => Code::ALREADY_EXISTS,
        GuestError::State(..) | GuestError::Lacking(..) => Code::FAILED_PRECONDITION,
        GuestError::Request(_) | GuestError::Spec(..) | GuestError::Stdio(_, StdioError::Name(_)) => {
            Code::INVALID_ARGUMENT
        }
        GuestError::Full(..) => Code::RESOURCE_EXHAUSTED,
        // As with runc. A code of its own would say that the container is unknown.
        GuestError::Spawn(_, SpawnError::NotExecuted { .. }) => Code::UNKNOWN,
        GuestError::Mount(..)
        | GuestError::Cgroup(..)
        | GuestError::Stdio(..)
        | GuestError::Spawn(..)
        | GuestError::System(..) => Code::INTERNAL,
    };
    rpc_status(code, chain(&error))
}

/// Carries an operation through even if nobody waits for it any more.
///
/// # Errors
/// Its own, as a status.
pub async fn complete<T: Send + 'static>(
    operation: impl Future<Output = Result<T, GuestError>> + Send + 'static,
) -> ttrpc::Result<T> {
    match tokio::spawn(operation).await {
        Ok(result) => result.map_err(rpc_error),
        Err(error) => Err(rpc_status(Code::INTERNAL, error)),
    }
}

fn timestamp(ns: i64) -> MessageField<Timestamp> {
    let nanos = i32::try_from(ns.rem_euclid(1_000_000_000)).unwrap_or(0);
    MessageField::some(Timestamp { seconds: ns.div_euclid(1_000_000_000), nanos, ..Default::default() })
}

#[async_trait]
impl Task for Tasks {
    async fn create(&self, _: &TtrpcContext, request: CreateTaskRequest) -> ttrpc::Result<CreateTaskResponse> {
        let options = request.options.into_option().unwrap_or_default();
        if options.type_url != CONTAINER_TYPE {
            let text = format!("read request: expected options of type {CONTAINER_TYPE}");
            return Err(rpc_status(Code::INVALID_ARGUMENT, text));
        }
        let (stdin, stdout, stderr) = (request.stdin, request.stdout, request.stderr);
        let names = Names { stdin, stdout, stderr, terminal: request.terminal };
        let (guest, id) = (self.0.clone(), request.id);
        let pid = complete(async move { guest.create(&id, &options.value, names).await }).await?;
        Ok(CreateTaskResponse { pid, ..Default::default() })
    }

    async fn start(&self, _: &TtrpcContext, request: StartRequest) -> ttrpc::Result<StartResponse> {
        let (guest, id, exec_id) = (self.0.clone(), request.id, request.exec_id);
        let started = async move {
            if exec_id.is_empty() { guest.start_init(&id).await } else { guest.start_exec(&id, &exec_id).await }
        };
        Ok(StartResponse { pid: complete(started).await?, ..Default::default() })
    }

    async fn exec(&self, _: &TtrpcContext, request: ExecProcessRequest) -> ttrpc::Result<Empty> {
        let (stdin, stdout, stderr) = (request.stdin, request.stdout, request.stderr);
        let names = Names { stdin, stdout, stderr, terminal: request.terminal };
        let spec = request.spec.into_option().unwrap_or_default().value;
        self.0.exec(&request.id, &request.exec_id, spec, names).map_err(rpc_error)?;
        Ok(Empty::new())
    }

    async fn delete(&self, _: &TtrpcContext, request: DeleteRequest) -> ttrpc::Result<DeleteResponse> {
        let (guest, id, exec_id) = (self.0.clone(), request.id, request.exec_id);
        let deleted =
            async move { if exec_id.is_empty() { guest.delete(&id).await } else { guest.delete_exec(&id, &exec_id) } };
        let (pid, ended) = complete(deleted).await?;
        let exited_at = timestamp(ended.at_ns);
        Ok(DeleteResponse { pid, exit_status: ended.status, exited_at, ..Default::default() })
    }

    async fn state(&self, _: &TtrpcContext, request: StateRequest) -> ttrpc::Result<StateResponse> {
        let look = self.0.look(&request.id, &request.exec_id).map_err(rpc_error)?;
        let status = match look.phase {
            Phase::Created | Phase::Starting => Status::CREATED,
            Phase::Running if look.paused => Status::PAUSED,
            Phase::Running => Status::RUNNING,
            Phase::Stopped(_) => Status::STOPPED,
        };
        let mut response = StateResponse {
            id: request.id,
            exec_id: request.exec_id,
            pid: look.pid,
            status: status.into(),
            stdin: look.names.stdin,
            stdout: look.names.stdout,
            stderr: look.names.stderr,
            terminal: look.names.terminal,
            ..Default::default()
        };
        if let Phase::Stopped(ended) = look.phase {
            response.exit_status = ended.status;
            response.exited_at = timestamp(ended.at_ns);
        }
        Ok(response)
    }

    async fn wait(&self, _: &TtrpcContext, request: WaitRequest) -> ttrpc::Result<WaitResponse> {
        let ended = self.0.wait(&request.id, &request.exec_id).await.map_err(rpc_error)?;
        Ok(WaitResponse { exit_status: ended.status, exited_at: timestamp(ended.at_ns), ..Default::default() })
    }

    async fn kill(&self, _: &TtrpcContext, request: KillRequest) -> ttrpc::Result<Empty> {
        self.0.kill(&request.id, &request.exec_id, request.signal, request.all).map_err(rpc_error)?;
        Ok(Empty::new())
    }

    async fn pids(&self, _: &TtrpcContext, request: PidsRequest) -> ttrpc::Result<PidsResponse> {
        let pids = self.0.pids(&request.id).map_err(rpc_error)?;
        let processes = pids.into_iter().take(MAX_PIDS).map(|pid| ProcessInfo { pid, ..Default::default() }).collect();
        Ok(PidsResponse { processes, ..Default::default() })
    }

    async fn pause(&self, _: &TtrpcContext, request: PauseRequest) -> ttrpc::Result<Empty> {
        let guest = self.0.clone();
        complete(async move { guest.freeze(&request.id, true).await }).await?;
        Ok(Empty::new())
    }

    async fn resume(&self, _: &TtrpcContext, request: ResumeRequest) -> ttrpc::Result<Empty> {
        let guest = self.0.clone();
        complete(async move { guest.freeze(&request.id, false).await }).await?;
        Ok(Empty::new())
    }

    async fn update(&self, _: &TtrpcContext, request: UpdateTaskRequest) -> ttrpc::Result<Empty> {
        self.0.update(&request.id, &request.resources.value).map_err(rpc_error)?;
        Ok(Empty::new())
    }

    async fn stats(&self, _: &TtrpcContext, request: StatsRequest) -> ttrpc::Result<StatsResponse> {
        let metrics = self.0.stats(&request.id).map_err(rpc_error)?;
        let value = metrics.write_to_bytes().map_err(|error| rpc_status(Code::INTERNAL, error))?;
        let stats = Any { type_url: METRICS_TYPE.to_owned(), value, ..Default::default() };
        Ok(StatsResponse { stats: MessageField::some(stats), ..Default::default() })
    }

    async fn resize_pty(&self, _: &TtrpcContext, request: ResizePtyRequest) -> ttrpc::Result<Empty> {
        let (id, exec_id) = (&request.id, &request.exec_id);
        self.0.resize(id, exec_id, request.width, request.height).map_err(rpc_error)?;
        Ok(Empty::new())
    }

    async fn close_io(&self, _: &TtrpcContext, request: CloseIORequest) -> ttrpc::Result<Empty> {
        if request.stdin {
            self.0.close_stdin(&request.id, &request.exec_id).map_err(rpc_error)?;
        }
        Ok(Empty::new())
    }

    async fn connect(&self, _: &TtrpcContext, request: ConnectRequest) -> ttrpc::Result<ConnectResponse> {
        let task_pid = self.0.look(&request.id, "").map_or(0, |look| look.pid);
        let version = env!("CARGO_PKG_VERSION").to_owned();
        Ok(ConnectResponse { shim_pid: std::process::id(), task_pid, version, ..Default::default() })
    }

    async fn checkpoint(&self, _: &TtrpcContext, _: CheckpointTaskRequest) -> ttrpc::Result<Empty> {
        Err(rpc_status(Code::UNIMPLEMENTED, "checkpoint: a guest cannot be written to disk"))
    }

    async fn shutdown(&self, _: &TtrpcContext, _: ShutdownRequest) -> ttrpc::Result<Empty> {
        // The guest ends by nacelle.agent.v1.Agent/Shutdown.
        Ok(Empty::new())
    }
}
