//! The host's network, for a container that asks for it: its sockets are the host's.

use std::{
    io::{Read, Write},
    net::{TcpListener, TcpStream},
    time::Duration,
};

use nacelle_tests::{
    command::{eventually, patience},
    node::{BUSYBOX, Node},
};

use crate::Case;

pub const CASES: &[Case] = &[
    Case::new("of_the_host_outwards", of_the_host_outwards),
    Case::new("of_the_host_inwards", of_the_host_inwards),
    Case::new("none_without_asking", none_without_asking),
];

fn of_the_host_outwards(node: &Node) {
    let server = TcpListener::bind("127.0.0.1:0").expect("listen");
    let port = server.local_addr().expect("an address").port();
    let run = node.run(&["--rm", "--net-host"], BUSYBOX, &["sh", "-c", &format!("echo ping | nc 127.0.0.1 {port}")]);
    let run = run.spawn();
    let (mut connection, _) = server.accept().expect("accept");
    let mut word = [0; 5];
    connection.read_exact(&mut word).expect("read");
    assert_eq!(&word, b"ping\n");
    connection.write_all(b"pong\n").expect("write");
    drop(connection);
    assert_eq!(run.wait(patience()).expect(0).text(), "pong");
}

fn of_the_host_inwards(node: &Node) {
    // A port that is free now.
    let port = TcpListener::bind("127.0.0.1:0").and_then(|l| l.local_addr()).expect("a port").port();
    let c =
        node.detached(&["--net-host"], BUSYBOX, &["sh", "-c", &format!("echo hello | nc -l -p {port}; sleep 1000")]);
    let connection = eventually(patience(), || TcpStream::connect(("127.0.0.1", port)).ok());
    let mut connection = connection.expect("the container listens on the host");
    connection.set_read_timeout(Some(patience())).expect("set a deadline");
    let mut line = [0; 6];
    connection.read_exact(&mut line).expect("read");
    assert_eq!(&line, b"hello\n");
    drop(connection);
    c.remove();
}

fn none_without_asking(node: &Node) {
    let server = TcpListener::bind("127.0.0.1:0").expect("listen");
    let port = server.local_addr().expect("an address").port();
    let c = node.resident();
    let probe = c.exec(&[], &["nc", "-w", "2", "127.0.0.1", &port.to_string()]).within(Duration::from_secs(60)).run();
    assert_ne!(probe.code, 0, "a container without a network reached the host: {probe}");
}
