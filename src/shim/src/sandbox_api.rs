//! containerd's Sandbox service (`sandboxer = "shim"`) ↔ calls. A sandbox is the container without a process that a pod's
//! first bundle stands for otherwise, so there is one state machine for both ways.
//!
//! ```text
//!  CreateSandbox   Create     boots the VM             SandboxStatus    State
//!  StartSandbox    Start                               WaitSandbox      Wait
//!  StopSandbox     End        the VM and all in it     SandboxMetrics   Stats
//!  ShutdownSandbox End        and the shim             Ping, Platform   –
//! ```

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use async_trait::async_trait;
use containerd_shim_protos::sandbox_api::{
    CreateSandboxRequest, CreateSandboxResponse, PingRequest, PingResponse, PlatformRequest, PlatformResponse,
    SandboxMetricsRequest, SandboxMetricsResponse, SandboxStatusRequest, SandboxStatusResponse, ShutdownSandboxRequest,
    ShutdownSandboxResponse, StartSandboxRequest, StartSandboxResponse, StopSandboxRequest, StopSandboxResponse,
    WaitSandboxRequest, WaitSandboxResponse,
};
use containerd_shim_protos::sandbox_async::{Sandbox, create_sandbox};
use containerd_shim_protos::types::platform::Platform;
use nacelle_protocol::cri::PodSandboxConfig;
use protobuf::well_known_types::any::Any;
use protobuf::{Message, MessageField};
use ttrpc::r#async::{Service, TtrpcContext};
use ttrpc::{Code, get_status};

use crate::driver::Handle;
use crate::guest::STATS_TYPE;
use crate::pod_config;
use crate::publisher::{now_ns, timestamp};
use crate::sandbox::{Phase, Refusal};
use crate::service::{exited_at, invalid, key, odd, status};
use crate::stdio::Wanted;
use crate::task::{Call, Create, Reply, State, TaskError};

/// Words of Kubernetes' `PodSandboxState`.
const READY: &str = "SANDBOX_READY";
const NOT_READY: &str = "SANDBOX_NOTREADY";
/// Last part of the type of a pod's configuration, which had another package in containerd 1.7.
const CONFIG_TYPE: &str = "PodSandboxConfig";

#[derive(Debug)]
struct SandboxService {
    driver: Handle,
    /// Nanoseconds since 1970.
    created: Mutex<Option<i64>>,
}

/// The service, by its name.
pub fn service(driver: &Handle) -> HashMap<String, Service> {
    create_sandbox(Arc::new(SandboxService { driver: driver.clone(), created: Mutex::new(None) }))
}

impl SandboxService {
    async fn call(&self, id: &str, call: Call) -> ttrpc::Result<Reply> {
        self.driver.call(key(id, "")?, call).await.map_err(|error| status(&error))
    }

    async fn state(&self, id: &str) -> ttrpc::Result<State> {
        match self.call(id, Call::State).await? {
            Reply::State(state) => Ok(state),
            other => Err(odd(&other)),
        }
    }

    fn created(&self) -> std::sync::MutexGuard<'_, Option<i64>> {
        self.created.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn pod_config(options: Option<&Any>) -> ttrpc::Result<PodSandboxConfig> {
    let ours = options.filter(|any| any.type_url.rsplit(['.', '/']).next() == Some(CONFIG_TYPE));
    let config = ours.map(|any| PodSandboxConfig::parse_from_bytes(&any.value)).transpose();
    Ok(config.map_err(|e| invalid("pod's configuration", &e))?.unwrap_or_default())
}

#[async_trait]
impl Sandbox for SandboxService {
    async fn create_sandbox(
        &self,
        _: &TtrpcContext,
        request: CreateSandboxRequest,
    ) -> ttrpc::Result<CreateSandboxResponse> {
        tracing::info!("create sandbox {}", request.sandbox_id);
        let id = key(&request.sandbox_id, "")?.container;
        let config = pod_config(request.options.as_ref())?;
        let sandbox = pod_config::translate(&id, &config, &request.netns_path, request.annotations);
        let create = Create {
            bundle: PathBuf::from(request.bundle_path),
            rootfs: Vec::new(),
            io: Wanted::default(),
            origin: None,
            sandbox: Some(Box::new(sandbox)),
        };
        self.call(&request.sandbox_id, Call::Create(create)).await?;
        *self.created() = Some(now_ns());
        Ok(CreateSandboxResponse::default())
    }

    async fn start_sandbox(
        &self,
        _: &TtrpcContext,
        request: StartSandboxRequest,
    ) -> ttrpc::Result<StartSandboxResponse> {
        let started = self.driver.call(key(&request.sandbox_id, "")?, Call::Start).await;
        let pid = match started {
            Ok(Reply::Pid(pid)) => pid,
            Ok(other) => return Err(odd(&other)),
            Err(TaskError::Refused(Refusal::NotFound, _)) => {
                let text = format!("failed precondition: start sandbox {}: it was not created", request.sandbox_id);
                return Err(ttrpc::Error::RpcStatus(get_status(Code::FAILED_PRECONDITION, text)));
            }
            Err(error) => return Err(status(&error)),
        };
        let created_at = timestamp(self.created().unwrap_or_else(now_ns));
        Ok(StartSandboxResponse { pid, created_at: MessageField::some(created_at), ..Default::default() })
    }

    async fn platform(&self, _: &TtrpcContext, _: PlatformRequest) -> ttrpc::Result<PlatformResponse> {
        let architecture = if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" };
        let platform = Platform { os: "linux".into(), architecture: architecture.into(), ..Default::default() };
        Ok(PlatformResponse { platform: MessageField::some(platform), ..Default::default() })
    }

    async fn stop_sandbox(&self, _: &TtrpcContext, request: StopSandboxRequest) -> ttrpc::Result<StopSandboxResponse> {
        tracing::info!("stop sandbox {}", request.sandbox_id);
        self.call(&request.sandbox_id, Call::End { leave: false }).await?;
        Ok(StopSandboxResponse::default())
    }

    async fn wait_sandbox(&self, _: &TtrpcContext, request: WaitSandboxRequest) -> ttrpc::Result<WaitSandboxResponse> {
        match self.call(&request.sandbox_id, Call::Wait).await? {
            Reply::Exit(_, exit) => Ok(WaitSandboxResponse {
                exit_status: exit.map_or(0, |exit| exit.status),
                exited_at: exited_at(exit),
                ..Default::default()
            }),
            other => Err(odd(&other)),
        }
    }

    async fn sandbox_status(
        &self,
        _: &TtrpcContext,
        request: SandboxStatusRequest,
    ) -> ttrpc::Result<SandboxStatusResponse> {
        let state = self.state(&request.sandbox_id).await?;
        let ready = state.phase == Phase::Running && state.exit.is_none();
        let ready = if ready { READY } else { NOT_READY };
        let mut info = HashMap::new();
        if request.verbose {
            info.insert("pid".to_owned(), state.pid.to_string());
            info.insert("state".to_owned(), ready.to_owned());
        }
        Ok(SandboxStatusResponse {
            info,
            sandbox_id: request.sandbox_id,
            pid: state.pid,
            state: ready.to_owned(),
            created_at: self.created().map(timestamp).into(),
            exited_at: exited_at(state.exit),
            ..Default::default()
        })
    }

    async fn ping_sandbox(&self, _: &TtrpcContext, request: PingRequest) -> ttrpc::Result<PingResponse> {
        self.state(&request.sandbox_id).await?;
        Ok(PingResponse::default())
    }

    async fn shutdown_sandbox(
        &self,
        _: &TtrpcContext,
        request: ShutdownSandboxRequest,
    ) -> ttrpc::Result<ShutdownSandboxResponse> {
        tracing::info!("shut down sandbox {}", request.sandbox_id);
        self.call(&request.sandbox_id, Call::End { leave: true }).await?;
        Ok(ShutdownSandboxResponse::default())
    }

    async fn sandbox_metrics(
        &self,
        _: &TtrpcContext,
        request: SandboxMetricsRequest,
    ) -> ttrpc::Result<SandboxMetricsResponse> {
        match self.call(&request.sandbox_id, Call::Stats).await? {
            Reply::Stats(value) => {
                let data = Any { type_url: STATS_TYPE.to_owned(), value, ..Any::default() };
                let mut response = SandboxMetricsResponse::default();
                let metrics = response.metrics.mut_or_insert_default();
                metrics.timestamp = MessageField::some(timestamp(now_ns()));
                metrics.id = request.sandbox_id;
                metrics.data = MessageField::some(data);
                Ok(response)
            }
            other => Err(odd(&other)),
        }
    }
}
