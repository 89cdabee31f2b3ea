//! The pod's network: whatever CNI has put into its namespace is the guest's, and its loopback is reached from there.

use std::{
    fs,
    io::{Read, Write},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, Shutdown, TcpListener, TcpStream, UdpSocket},
    os::unix::fs::PermissionsExt,
    thread,
    time::Duration,
};

use nacelle_tests::{
    command::{Cmd, eventually, patience, within},
    grpc::Message,
    lan::{Lan, MTU, ip},
    node::{BUSYBOX, Container, Node},
};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::json;
use sha2::{Digest, Sha256};

use crate::Case;

const DEVICES: &str = "it is about devices of a VM";
const PORTS: &str = "a container's processes are in the namespace themselves";

pub const CASES: &[Case] = &[
    Case::new("of_cni_is_carried", of_cni_is_carried),
    Case::new("carries_bytes_both_ways", carries_bytes_both_ways),
    Case::new("with_two_interfaces_and_a_host_port", with_two_interfaces_and_a_host_port),
    Case::new("resolves_names", resolves_names),
    Case::new("filled_by_a_hook", filled_by_a_hook),
    Case::new("without_interfaces", without_interfaces),
    Case::only_nacelle("of_another_vm_is_refused", of_another_vm_is_refused, DEVICES),
    Case::only_nacelle("that_comes_late_is_refused", that_comes_late_is_refused, DEVICES),
    Case::only_nacelle("with_too_many_interfaces_is_refused", with_too_many_interfaces_is_refused, DEVICES),
    Case::new("forwards_a_hundred_connections", forwards_a_hundred_connections),
    Case::only_nacelle("forwards_to_ipv6_and_resets_the_rest", forwards_to_ipv6_and_resets_the_rest, PORTS),
    Case::only_nacelle("survives_its_shim", survives_its_shim, "its shim leaves a namespace as it is"),
];

/// A container in the namespace that does nothing until told.
fn container<'n>(node: &'n Node, lan: &Lan, image: &str, command: &[&str]) -> Container<'n> {
    let flag = lan.flag();
    node.detached(&[&flag[0], &flag[1]], image, command)
}

fn idle<'n>(node: &'n Node, lan: &Lan) -> Container<'n> {
    container(node, lan, BUSYBOX, &["sleep", "1000000"])
}

/// Bytes without a pattern that a mistake could repeat.
fn noise(length: usize, seed: u64) -> Vec<u8> {
    let mut state = seed | 1;
    let mut next = || {
        // xorshift64
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    };
    let mut bytes: Vec<u8> = std::iter::repeat_with(&mut next).take(length.div_ceil(8)).flatten().collect();
    bytes.truncate(length);
    bytes
}

fn sum(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

fn of_cni_is_carried(node: &Node) {
    let mut lan = Lan::new(node);
    let given = lan.bridge("eth0", &[]);
    // What a plugin may leave besides: a neighbour, a route over a gateway that is on the link, a metric.
    lan.ip(&format!("neigh add {} lladdr 02:00:00:00:00:99 dev eth0 nud permanent", Ipv4Addr::new(10, 90, 0, 200)));
    lan.ip("route add 198.51.100.0/24 via 169.254.7.7 dev eth0 onlink metric 77");
    lan.ip("route add unreachable 192.0.2.0/24");
    lan.ip("-6 route add 2001:db8::/32 via fd09:0::1 metric 99");
    let links = lan.ip("-o link show eth0");
    let mac = links.split("link/ether ").nth(1).and_then(|rest| rest.split(' ').next()).expect("a MAC").to_owned();
    let c = idle(node, &lan);
    let link = c.sh("ip link show eth0");
    assert!(link.contains(&mac) && link.contains(&format!("mtu {MTU}")) && link.contains("UP"), "{link}");
    let addresses = c.sh("ip addr show eth0");
    for wanted in [format!("inet {}/24", given.v4), format!("inet6 {}/64", given.v6), "inet6 fe80::".into()] {
        assert!(addresses.contains(&wanted), "{wanted}: {addresses}");
    }
    assert!(!addresses.contains("tentative"), "{addresses}");
    let routes = c.sh("ip route; ip -6 route");
    for wanted in [
        format!("default via {} dev eth0", given.gateway),
        "198.51.100.0/24 via 169.254.7.7 dev eth0".into(),
        "metric 77".into(),
        "unreachable 192.0.2.0/24".into(),
        format!("default via {} dev eth0", given.gateway6),
        "2001:db8::/32 via fd09::1 dev eth0".into(),
    ] {
        assert!(routes.contains(&wanted), "{wanted}: {routes}");
    }
    let neighbours = c.sh("ip neigh show dev eth0");
    let set = neighbours.lines().find(|line| line.contains("10.90.0.200 lladdr 02:00:00:00:00:99"));
    assert!(set.is_some_and(|line| line.contains("PERMANENT")), "{neighbours}");
    for gateway in [given.gateway.to_string(), given.gateway6.to_string()] {
        c.exec(&[], &["ping", "-c", "2", "-W", "5", &gateway]).ok();
    }
    for pod in [given.v4.to_string(), given.v6.to_string()] {
        Cmd::new("ping").args(["-c", "2", "-W", "5", &pod]).ok();
    }
    // Not larger than the MTU, and not smaller.
    Cmd::new("ping")
        .args(["-c", "1", "-W", "5", "-M", "do", "-s", &(MTU - 28).to_string(), &given.v4.to_string()])
        .ok();
    c.remove();
    assert_eq!(within(patience(), "no trace in the namespace", || lan.traces().is_empty().then_some(())), ());
    lan.ip("link show eth0");
}

/// Both protocols, both directions, and more than any buffer on the way holds.
fn carries_bytes_both_ways(node: &Node) {
    const LENGTH: usize = 3 << 20;
    let mut lan = Lan::new(node);
    let given = lan.bridge("eth0", &[]);
    let c = idle(node, &lan);
    let bytes = noise(LENGTH, 7);
    for (number, (pod, host)) in
        [(IpAddr::from(given.v4), IpAddr::from(given.gateway)), (given.v6.into(), given.gateway6.into())]
            .into_iter()
            .enumerate()
    {
        let port = 5000 + number as u16;
        let inwards = c.exec(&[], &["sh", "-c", &format!("nc -l -p {port} </dev/null | sha256sum")]).spawn();
        let connection =
            eventually(patience(), || TcpStream::connect_timeout(&(pod, port).into(), Duration::from_secs(1)).ok());
        let mut connection = connection.expect("the container listens");
        connection.write_all(&bytes).expect("write");
        drop(connection);
        assert!(inwards.wait(patience()).expect(0).text().starts_with(&sum(&bytes)), "inwards, {pod}");

        let server = TcpListener::bind((host, 0)).expect("listen");
        let port = server.local_addr().expect("an address").port();
        let outwards = c.exec(&[], &["sh", "-c", &format!("nc {host} {port} </dev/null | sha256sum")]).spawn();
        let (mut connection, from) = server.accept().expect("accept");
        assert_eq!(from.ip(), pod);
        connection.write_all(&bytes).expect("write");
        drop(connection);
        assert!(outwards.wait(patience()).expect(0).text().starts_with(&sum(&bytes)), "outwards, {host}");
    }
    c.remove();
}

fn with_two_interfaces_and_a_host_port(node: &Node) {
    let mut lan = Lan::new(node);
    let first = lan.bridge("eth0", &[(18080, 8080)]);
    let second = lan.bridge("net1", &[]);
    let serve = "mkdir /www; echo hello from the pod >/www/index.html; exec httpd -f -p 8080 -h /www";
    let c = container(node, &lan, BUSYBOX, &["sh", "-c", serve]);
    let names = c.sh("ls /sys/class/net");
    assert_eq!(names.split_whitespace().collect::<Vec<_>>(), ["eth0", "lo", "net1"]);
    let fetch = |address: (IpAddr, u16)| {
        let mut connection = TcpStream::connect_timeout(&address.into(), Duration::from_secs(2)).ok()?;
        connection.set_read_timeout(Some(patience())).ok()?;
        connection.write_all(b"GET / HTTP/1.0\r\n\r\n").ok()?;
        let mut answer = String::new();
        connection.read_to_string(&mut answer).ok()?;
        answer.contains("hello from the pod").then_some(())
    };
    for address in [first.v4.into(), first.v6.into(), second.v4.into(), second.v6.into()] {
        within(patience(), &format!("{address} answers"), || fetch((address, 8080)));
    }
    for gateway in [first.gateway, second.gateway] {
        c.exec(&[], &["ping", "-c", "1", "-W", "5", &gateway.to_string()]).ok();
    }
    // The plugin portmap works by the host's rules, so any address of the host's will do.
    within(patience(), "the host's port answers", || fetch((first.gateway.into(), 18080)));
    c.remove();
}

/// A server of names on the bridge, which the container knows by its `resolv.conf`.
fn resolves_names(node: &Node) {
    let mut lan = Lan::new(node);
    let given = lan.bridge("eth0", &[]);
    let server = UdpSocket::bind((given.gateway, 53)).expect("listen");
    server.set_read_timeout(Some(patience())).expect("set a deadline");
    let serving = thread::spawn(move || {
        let mut packet = [0; 512];
        // RFC 1035, section 4: the question comes back, with one answer if it is for an address of class IN, type A.
        while let Ok((length, from)) = server.recv_from(&mut packet) {
            let question = &packet[..length];
            if question.ends_with(b"stop") {
                return;
            }
            let end = 12 + question[12..].iter().position(|b| *b == 0).expect("a name") + 5;
            let a = question[end - 4..end] == [0, 1, 0, 1];
            let mut answer = question[..2].to_vec();
            answer.extend([0x81, 0x80, 0, 1, 0, u8::from(a), 0, 0, 0, 0]);
            answer.extend(&question[12..end]);
            if a {
                answer.extend([0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 60, 0, 4, 192, 0, 2, 77]);
            }
            server.send_to(&answer, from).expect("answer");
        }
    });
    let resolv = node.path("resolv.conf");
    fs::write(&resolv, format!("nameserver {}\n", given.gateway)).expect("write");
    let flag = lan.flag();
    let mount = format!("type=bind,src={},dst=/etc/resolv.conf,options=rbind:ro", resolv.display());
    let c = node.detached(&[&flag[0], &flag[1], "--mount", &mount], BUSYBOX, &["sleep", "1000000"]);
    let answer = c.exec(&[], &["nslookup", "pod.nacelle.test"]).run();
    assert!(answer.text().contains("192.0.2.77"), "{answer}");
    c.remove();
    UdpSocket::bind((given.gateway, 0)).and_then(|s| s.send_to(b"stop", (given.gateway, 53))).expect("send");
    serving.join().expect("the server of names");
}

/// As nerdctl does it: the namespace is nacelle's own, and a hook that is told of a process in it fills it.
fn filled_by_a_hook(node: &Node) {
    let hook = node.path("network-hook");
    let script = "#!/bin/sh\nset -e\npid=$(sed 's/.*\"pid\": *\\([0-9]*\\).*/\\1/')\n\
        ip link add nhook0 type veth peer name eth0 netns /proc/$pid/ns/net\n\
        ip addr add 10.98.0.1/24 dev nhook0\nip link set nhook0 up\n\
        nsenter -t $pid -n ip addr add 10.98.0.2/24 dev eth0\nnsenter -t $pid -n ip link set eth0 up\n";
    fs::write(&hook, script).expect("write a hook");
    fs::set_permissions(&hook, fs::Permissions::from_mode(0o755)).expect("make it executable");
    let c = node.created(&[], BUSYBOX, &["sleep", "1000"]);
    c.edit(|spec| {
        spec["hooks"] = json!({"createRuntime": [{"path": hook, "env": ["PATH=/usr/sbin:/usr/bin:/sbin:/bin"]}]})
    });
    c.start(&["--detach"]).ok();
    let addresses = c.sh("ip addr show eth0");
    assert!(addresses.contains("inet 10.98.0.2/24"), "{addresses}");
    c.exec(&[], &["ping", "-c", "1", "-W", "5", "10.98.0.1"]).ok();
    Cmd::new("ping").args(["-c", "1", "-W", "5", "10.98.0.2"]).ok();
    c.remove();
}

fn without_interfaces(node: &Node) {
    let lan = Lan::new(node);
    let c = idle(node, &lan);
    assert_eq!(c.sh("ls /sys/class/net"), "lo");
    c.exec(&[], &["ping", "-c", "1", "-W", "5", "127.0.0.1"]).ok();
    c.remove();
}

fn of_another_vm_is_refused(node: &Node) {
    let mut lan = Lan::new(node);
    let given = lan.bridge("eth0", &[]);
    let first = idle(node, &lan);
    let flag = lan.flag();
    let second = node.run(&["--rm", &flag[0], &flag[1]], BUSYBOX, &["true"]).run();
    second.expect_failure(&["carry interface eth0 into the VM", "another VM's"]);
    first.exec(&[], &["ping", "-c", "1", "-W", "5", &given.gateway.to_string()]).ok();
    first.remove();
    let host = node.run(&["--rm", "--with-ns", "network:/proc/1/ns/net"], BUSYBOX, &["true"]).run();
    host.expect_failure(&["join network namespace /proc/1/ns/net: it is the host's own"]);
}

/// As `ctr run --cni` does it: between Create and Start.
fn that_comes_late_is_refused(node: &Node) {
    let c = node.created(&[], BUSYBOX, &["sleep", "1000"]);
    c.create_task(&c.mounts()).unwrap_or_else(|e| panic!("create: {e}"));
    let netns = format!("/proc/{}/ns/net", c.pid());
    ip(&format!("link add nlate0 type veth peer name eth0 netns {netns}"));
    Cmd::new("nsenter").args([&format!("--net={netns}"), "ip", "link", "set", "eth0", "up"]).ok();
    let start = Message::default().bytes(1, c.id());
    let error = node.call("/containerd.services.tasks.v1.Tasks/Start", start, patience()).expect_err("it is too late");
    assert!(error.to_string().contains("carry interfaces eth0 into the VM: they came when it had started"), "{error}");
    c.remove();
}

fn with_too_many_interfaces_is_refused(node: &Node) {
    let lan = Lan::new(node);
    for number in 0..9 {
        lan.ip(&format!("link add net{number} type dummy"));
        lan.ip(&format!("link set net{number} up"));
    }
    let flag = lan.flag();
    let run = node.run(&["--rm", &flag[0], &flag[1]], BUSYBOX, &["true"]).run();
    run.expect_failure(&["carry interfaces net0, net1,", "there is room for"]);
    assert!(lan.traces().is_empty(), "{:?}", lan.traces());
}

/// Reads all that a client says, and says how much it was and its digest; then all of it again.
const ECHO: &str = "
import hashlib, socket, socketserver, sys, threading
class Echo(socketserver.BaseRequestHandler):
    def handle(self):
        parts = []
        while part := self.request.recv(65536):
            parts.append(part)
        data = b''.join(parts)
        self.request.sendall(hashlib.sha256(data).hexdigest().encode() + data)
class Server(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
    request_queue_size = 512
    daemon_threads = True
class Server6(Server):
    address_family = socket.AF_INET6
threading.Thread(target=Server6(('::1', 7001), Echo).serve_forever, daemon=True).start()
print('ready', flush=True)
Server(('127.0.0.1', 7000), Echo).serve_forever()
";

/// What a client sends, ended on its side alone, and what it gets back.
fn echo(address: (IpAddr, u16), bytes: &[u8]) -> std::io::Result<Vec<u8>> {
    let mut connection = TcpStream::connect(address)?;
    connection.set_read_timeout(Some(patience()))?;
    connection.write_all(bytes)?;
    connection.shutdown(Shutdown::Write)?;
    let mut answer = Vec::new();
    connection.read_to_end(&mut answer)?;
    Ok(answer)
}

fn echo_server<'n>(node: &'n Node, lan: &Lan) -> Container<'n> {
    let image = node.image("debian-python");
    let c = container(node, lan, &image, &["python3", "-c", ECHO]);
    let ready = "import socket; socket.create_connection(('127.0.0.1', 7000), 5)";
    within(patience(), "the server listens", || (c.exec(&[], &["python3", "-c", ready]).run().code == 0).then_some(()));
    c
}

/// As containerd does for `kubectl port-forward`: it dials the loopback of the pod's namespace on the host.
fn forwards_a_hundred_connections(node: &Node) {
    const CONNECTIONS: u64 = 100;
    let mut lan = Lan::new(node);
    lan.bridge("eth0", &[]);
    let c = echo_server(node, &lan);
    let failures = lan.inside(|| {
        // The first alone: what is not there at all shall not be told a hundred times.
        let one = noise(5, 1);
        let answer = echo((Ipv4Addr::LOCALHOST.into(), 7000), &one).expect("a connection");
        assert_eq!(answer, [sum(&one).as_bytes(), &one].concat());
        let connections: Vec<_> = (0..CONNECTIONS)
            .map(|number| {
                // A connection's thread is in the namespace of the one that starts it.
                thread::spawn(move || {
                    let bytes = noise(64 << 10 | number as usize, number);
                    let answer = echo((Ipv4Addr::LOCALHOST.into(), 7000), &bytes)?;
                    Ok::<_, std::io::Error>(answer == [sum(&bytes).as_bytes(), &bytes].concat())
                })
            })
            .collect();
        let results = connections.into_iter().map(|c| c.join().expect("a thread"));
        results.filter(|result| !matches!(result, Ok(true))).map(|result| format!("{result:?}")).collect::<Vec<_>>()
    });
    assert!(failures.is_empty(), "{failures:?}");
    // And one that is larger than all windows together, while nobody reads on the other side until its end.
    let large = lan.inside(|| {
        let bytes = noise(8 << 20, 3);
        let answer = echo((Ipv4Addr::LOCALHOST.into(), 7000), &bytes).expect("a connection");
        answer == [sum(&bytes).as_bytes(), &bytes].concat()
    });
    assert!(large);
    c.remove();
}

fn forwards_to_ipv6_and_resets_the_rest(node: &Node) {
    let lan = Lan::new(node);
    let c = echo_server(node, &lan);
    lan.inside(|| {
        let bytes = noise(1000, 9);
        let expected = [sum(&bytes).as_bytes(), &bytes].concat();
        for ip in [IpAddr::from(Ipv6Addr::LOCALHOST), Ipv4Addr::LOCALHOST.into()] {
            assert_eq!(echo((ip, 7001), &bytes).expect("a connection"), expected, "{ip}");
        }
        // Nobody listens there: what can be told is told at once.
        let mut nobody = TcpStream::connect((Ipv4Addr::LOCALHOST, 7002)).expect("the shim accepts");
        nobody.set_read_timeout(Some(patience())).expect("set a deadline");
        let end = nobody.read(&mut [0]).expect_err("a reset").kind();
        assert_eq!(end, std::io::ErrorKind::ConnectionReset);
    });
    c.remove();
}

/// Its `delete` action cleans up, and the namespace is as it was: another VM can have it.
fn survives_its_shim(node: &Node) {
    let mut lan = Lan::new(node);
    let given = lan.bridge("eth0", &[]);
    let flag = lan.flag();
    // containerd deletes the task itself, so no client would remove FIFOs.
    let c = node.detached(&["--null-io", &flag[0], &flag[1]], BUSYBOX, &["sleep", "1000000"]);
    assert!(lan.traces().len() >= 3, "{:?}", lan.traces());
    let shims = fs::read_dir("/proc").expect("list /proc").flatten().filter_map(|entry| {
        let pid: i32 = entry.file_name().to_str()?.parse().ok()?;
        let words = fs::read(entry.path().join("cmdline")).ok()?;
        let words = String::from_utf8_lossy(&words).replace('\0', " ");
        (words.contains("containerd-shim-nacelle") && words.contains(&format!("-id {} ", c.id()))).then_some(pid)
    });
    let shims: Vec<_> = shims.collect();
    assert_eq!(shims.len(), 1, "{shims:?}");
    kill_process(Pid::from_raw(shims[0]).expect("a process id"), Signal::KILL).expect("kill the shim");
    within(patience(), "no trace in the namespace", || lan.traces().is_empty().then_some(()));
    c.delete();
    let c = idle(node, &lan);
    c.exec(&[], &["ping", "-c", "1", "-W", "5", &given.gateway.to_string()]).ok();
    c.remove();
    ip("link show nbr0");
}
