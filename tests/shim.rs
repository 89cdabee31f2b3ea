//! A shim driven directly, as containerd drives it: without a containerd in between, what containerd would not let
//! through can be sent, and what newer containerds send as well. Calls are ttrpc's, the messages containerd's.

use std::{
    cell::RefCell,
    fs,
    os::unix::fs::DirBuilderExt,
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
};

use containerd_shim_protos::{
    Client, Events, TaskClient,
    api::{Empty, ForwardRequest},
    bootstrap_api::{BootstrapParams, BootstrapResult},
    create_events,
    protobuf::Message,
    ttrpc::{self, Code, Server, TtrpcContext, context},
};

use rustix::fs::{CWD, FileType, Mode, mknodat};

use crate::{
    command::{Cmd, Finished, patience},
    node::{NAMESPACE, Node},
};

/// What containerd would have received.
#[derive(Clone, Default)]
struct Inbox(Arc<Mutex<Vec<String>>>);

impl Events for Inbox {
    fn forward(&self, _: &TtrpcContext, request: ForwardRequest) -> ttrpc::Result<Empty> {
        let topic = request.envelope.topic.clone();
        self.0.lock().expect("nothing panics here").push(topic);
        Ok(Empty::new())
    }
}

/// A bundle, and the shim for it. The test has to end the shim.
pub struct Shim {
    program: PathBuf,
    id: String,
    dir: PathBuf,
    inbox: Inbox,
    server: Option<Server>,
    client: RefCell<Option<TaskClient>>,
}

impl Shim {
    /// A bundle with this text as its `config.json`, and an endpoint for events. No shim runs yet.
    pub fn bundle(node: &Node, spec: &str) -> Self {
        let id = node.fresh_id();
        let dir = node.path("bundles").join(&id);
        fs::DirBuilder::new().recursive(true).mode(0o711).create(dir.join("rootfs")).expect("make a bundle");
        fs::write(dir.join("config.json"), spec).expect("write a spec");
        let inbox = Inbox::default();
        let address = format!("unix://{}", dir.join("events.sock").display());
        let mut server =
            Server::new().bind(&address).expect("bind").register_service(create_events(Arc::new(inbox.clone())));
        server.start().expect("serve events");
        let program = node.shim_program();
        Self { program, id, dir, inbox, server: Some(server), client: RefCell::default() }
    }

    /// The container's id.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// The bundle.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Runs an action of the shim with what containerd gives every one of them.
    pub fn action(&self, node: &Node, action: &str, stdin: Vec<u8>) -> Finished {
        Cmd::new(&self.program)
            .args([
                "-namespace",
                NAMESPACE,
                "-id",
                &self.id,
                "-address",
                "/no/containerd",
                "-publish-binary",
                "/bin/false",
            ])
            .args(["-bundle".as_ref(), self.dir.as_os_str(), action.as_ref()])
            .cwd(&self.dir)
            .env("TTRPC_ADDRESS", self.dir.join("events.sock"))
            .env("MAX_SHIM_VERSION", "2")
            .env("NACELLE_CONFIG", node.path("nacelle.toml"))
            .stdin(stdin)
            .run()
    }

    /// What containerd from 2.3 on writes to the start action.
    pub fn bootstrap_params(&self) -> Vec<u8> {
        let params = BootstrapParams {
            instance_id: self.id.clone(),
            namespace: NAMESPACE.into(),
            containerd_ttrpc_address: self.dir.join("events.sock").display().to_string(),
            containerd_grpc_address: "/no/containerd".into(),
            containerd_version: "2.3.0".into(),
            ..BootstrapParams::default()
        };
        params.write_to_bytes().expect("encode a message")
    }

    /// Starts the shim as containerd 2.3 does, and connects to it.
    pub fn start(&self, node: &Node) -> BootstrapResult {
        let reply = self.action(node, "start", self.bootstrap_params()).expect(0);
        let result = BootstrapResult::parse_from_bytes(&reply.out).unwrap_or_else(|e| panic!("{e}: {reply}"));
        self.connect(&result.address);
        result
    }

    /// Connects to the shim.
    pub fn connect(&self, address: &str) {
        let client = Client::connect(address).unwrap_or_else(|e| panic!("connect to {address}: {e}"));
        *self.client.borrow_mut() = Some(TaskClient::new(client));
    }

    /// One call of the Task service.
    ///
    /// # Errors
    /// The status, as code and message.
    pub fn call<T>(
        &self,
        call: impl FnOnce(&TaskClient, context::Context) -> ttrpc::Result<T>,
    ) -> Result<T, (Code, String)> {
        let client = self.client.borrow();
        let client = client.as_ref().expect("the shim was started");
        call(client, context::with_duration(patience())).map_err(|error| match error {
            ttrpc::Error::RpcStatus(status) => (status.code(), status.message),
            other => (Code::UNKNOWN, other.to_string()),
        })
    }

    /// Topics of the events so far, in their order.
    pub fn topics(&self) -> Vec<String> {
        self.inbox.0.lock().expect("nothing panics here").clone()
    }

    /// Makes a FIFO in the bundle for a stream of a process.
    pub fn fifo(&self, name: &str) -> PathBuf {
        let path = self.dir.join(name);
        mknodat(CWD, &path, FileType::Fifo, Mode::from_raw_mode(0o600), 0).expect("make a FIFO");
        path
    }
}

impl Drop for Shim {
    fn drop(&mut self) {
        self.client.borrow_mut().take();
        if let Some(server) = self.server.take() {
            server.shutdown();
        }
        fs::remove_dir_all(&self.dir).ok();
    }
}
