//! Network namespaces with interfaces in them, as CNI's plugins make them for a pod.

use std::{
    fs::File,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    os::fd::AsFd,
    path::PathBuf,
};

use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use serde_json::{Value, json};

use crate::{command::Cmd, node::Node};

/// Where Debian's package `containernetworking-plugins` puts them.
const PLUGINS: &str = "/usr/lib/cni";

/// The longest packet of every network here: not the usual, so that it is seen whether it is carried.
pub const MTU: u32 = 1420;

/// A named network namespace, with what CNI has put into it. Dropped, all of it goes, bridges included.
pub struct Lan<'n> {
    node: &'n Node,
    name: String,
    attached: Vec<Attached>,
}

struct Attached {
    interface: String,
    configuration: Value,
    bridge: String,
}

/// What an interface got.
#[derive(Clone, Copy, Debug)]
pub struct Addresses {
    /// The pod's.
    pub v4: Ipv4Addr,
    /// The pod's.
    pub v6: Ipv6Addr,
    /// The bridge's.
    pub gateway: Ipv4Addr,
    /// The bridge's.
    pub gateway6: Ipv6Addr,
}

/// `ip` with these words, which has to succeed; what it prints.
pub fn ip(words: &str) -> String {
    Cmd::new("ip").args(words.split_whitespace()).ok().text()
}

impl<'n> Lan<'n> {
    /// An empty namespace, its loopback up.
    pub fn new(node: &'n Node) -> Self {
        let name = format!("nacelle-{}", node.fresh_id());
        ip(&format!("netns add {name}"));
        ip(&format!("-n {name} link set lo up"));
        Self { node, name, attached: Vec::new() }
    }

    /// The flags of `ctr run` for a container in it.
    pub fn flag(&self) -> [String; 2] {
        ["--with-ns".into(), format!("network:{}", self.path().display())]
    }

    /// Its file.
    pub fn path(&self) -> PathBuf {
        format!("/run/netns/{}", self.name).into()
    }

    /// `ip -n NAMESPACE` with these words.
    pub fn ip(&self, words: &str) -> String {
        ip(&format!("-n {} {words}", self.name))
    }

    /// Adds an interface on a bridge of its own, by the plugins bridge and host-local. Number N is 10.9N.0.0/24 and
    /// fd09:N::/64; the first is the way to everywhere. Ports of the host lead to ports of the pod by the plugin portmap.
    pub fn bridge(&mut self, interface: &str, ports: &[(u16, u16)]) -> Addresses {
        let number = self.attached.len();
        let bridge = format!("nbr{number}");
        let routes = if number == 0 { json!([{"dst": "0.0.0.0/0"}, {"dst": "::/0"}]) } else { json!([]) };
        let ranges = json!([[{"subnet": format!("10.9{number}.0.0/24")}], [{"subnet": format!("fd09:{number}::/64")}]]);
        let configuration = json!({
            "cniVersion": "1.0.0", "name": format!("nacelle-{number}"), "type": "bridge", "bridge": bridge,
            "isGateway": true, "mtu": MTU,
            "ipam": { "type": "host-local", "dataDir": self.node.path("cni"), "ranges": ranges, "routes": routes },
        });
        let result = self.plugin("ADD", "bridge", interface, &configuration);
        if !ports.is_empty() {
            let mappings: Vec<_> = ports
                .iter()
                .map(|(host, pod)| json!({"hostPort": host, "containerPort": pod, "protocol": "tcp"}))
                .collect();
            let portmap = json!({
                "cniVersion": "1.0.0", "name": format!("nacelle-{number}"), "type": "portmap", "snat": true,
                "runtimeConfig": { "portMappings": mappings }, "prevResult": result,
            });
            self.plugin("ADD", "portmap", interface, &portmap);
            self.attached.push(Attached {
                interface: interface.into(),
                configuration: portmap,
                bridge: bridge.clone(),
            });
        }
        self.attached.push(Attached { interface: interface.into(), configuration, bridge });
        let find = |field: &str, v4: bool| -> IpAddr {
            let addresses = result["ips"].as_array().expect("addresses").iter().filter_map(|ip| ip[field].as_str());
            let parsed = addresses.map(|text| text.split('/').next().expect("an address").parse().expect("an address"));
            parsed.into_iter().find(|ip: &IpAddr| ip.is_ipv4() == v4).expect("one of each family")
        };
        let (IpAddr::V4(v4), IpAddr::V4(gateway)) = (find("address", true), find("gateway", true)) else {
            unreachable!()
        };
        let (IpAddr::V6(v6), IpAddr::V6(gateway6)) = (find("address", false), find("gateway", false)) else {
            unreachable!()
        };
        Addresses { v4, v6, gateway, gateway6 }
    }

    fn plugin(&self, command: &str, plugin: &str, interface: &str, configuration: &Value) -> Value {
        let run = Cmd::new(format!("{PLUGINS}/{plugin}"))
            .env("CNI_COMMAND", command)
            .env("CNI_CONTAINERID", &self.name)
            .env("CNI_NETNS", self.path())
            .env("CNI_IFNAME", interface)
            .env("CNI_PATH", PLUGINS)
            .stdin(configuration.to_string());
        let done = run.ok();
        serde_json::from_slice(&done.out).unwrap_or(Value::Null)
    }

    /// Does something inside, on a thread of its own.
    pub fn inside<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> T {
        let netns = File::open(self.path()).expect("open the namespace");
        let thread = std::thread::spawn(move || {
            move_into_link_name_space(netns.as_fd(), Some(LinkNameSpaceType::Network)).expect("enter the namespace");
            work()
        });
        thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }

    /// What a VM has added: taps, and queueing disciplines.
    pub fn traces(&self) -> Vec<String> {
        let links = self.ip("-o link show");
        let disciplines = Cmd::new("tc").args(["-n", &self.name, "qdisc", "show"]).ok().text();
        let rules = Cmd::new("ip").args(["netns", "exec", &self.name, "nft", "list", "tables"]).ok().text();
        let lines = links.lines().chain(disciplines.lines()).chain(rules.lines());
        let ours = |line: &&str| line.contains(": nacelle") || line.contains("ingress") || line.contains("nacelle");
        lines.filter(ours).map(str::to_owned).collect()
    }
}

impl Drop for Lan<'_> {
    fn drop(&mut self) {
        for attached in self.attached.iter().rev() {
            let plugin = attached.configuration["type"].as_str().unwrap_or_default();
            let delete = Cmd::new(format!("{PLUGINS}/{plugin}"))
                .env("CNI_COMMAND", "DEL")
                .env("CNI_CONTAINERID", &self.name)
                .env("CNI_NETNS", self.path())
                .env("CNI_IFNAME", &attached.interface)
                .env("CNI_PATH", PLUGINS);
            delete.stdin(attached.configuration.to_string()).run();
            Cmd::new("ip").args(["link", "del", &attached.bridge]).run();
        }
        Cmd::new("ip").args(["netns", "del", &self.name]).run();
    }
}
