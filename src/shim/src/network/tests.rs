//! The real thing: namespaces, veth pairs, taps and tc of this machine. Needs root.

use std::fs::File;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::AsFd;
use std::path::PathBuf;

use nix::sched::{CloneFlags, setns, unshare};
use rtnetlink::packet_core::Parseable;
use rtnetlink::packet_route::address::{AddressAttribute, AddressFlags, AddressMessage};
use rtnetlink::packet_route::link::{LinkAttribute, LinkMessage};
use rtnetlink::packet_route::neighbour::NeighbourMessage;
use rtnetlink::packet_route::route::{RouteAttribute, RouteMessage, RouteScope, RouteType};
use rtnetlink::{Handle, LinkUnspec, LinkVeth, RouteMessageBuilder};

use super::*;

const UID: u32 = 700_000;
const SANDBOX: &str = "default/s1";
const POD: Ipv4Addr = Ipv4Addr::new(10, 7, 0, 2);
const PEER: Ipv4Addr = Ipv4Addr::new(10, 7, 0, 1);
const POD6: Ipv6Addr = Ipv6Addr::new(0xfd07, 0, 0, 0, 0, 0, 0, 2);
const PEER6: Ipv6Addr = Ipv6Addr::new(0xfd07, 0, 0, 0, 0, 0, 0, 1);

/// A new namespace. It lives as long as the value.
fn namespace() -> Netns {
    assert!(rustix::process::getuid().is_root(), "network namespaces are made by root: run these tests as root");
    let made = std::thread::spawn(|| {
        unshare(CloneFlags::CLONE_NEWNET).expect("unshare");
        Netns::open(&PathBuf::from(format!("/proc/{}/ns/net", rustix::thread::gettid()))).expect("open")
    });
    made.join().expect("namespace")
}

async fn index(handle: &Handle, name: &str) -> u32 {
    let found = link::list("x", handle.link().get().match_name(name.to_owned()).execute()).await.expect("find");
    found[0].header.index
}

async fn up(handle: &Handle, name: &str) -> u32 {
    let index = index(handle, name).await;
    handle.link().set(LinkUnspec::new_with_index(index).up().build()).execute().await.expect("up");
    index
}

/// `eth0` in one namespace, as a bridge plugin leaves it, with its other end in a second one.
async fn pod() -> (Netns, Netns) {
    let (pod, peer) = (namespace(), namespace());
    let other = File::open(peer.path()).expect("open");
    pod.run(async move |handle| {
        let pair = LinkVeth::new("eth0", "far").mtu(1400).address(vec![2, 7, 0, 0, 0, 2]).build();
        handle.link().add(pair).execute().await.expect("veth");
        let far = LinkUnspec::new_with_index(index(&handle, "far").await)
            .setns_by_fd(std::os::fd::AsRawFd::as_raw_fd(&other));
        handle.link().set(far.build()).execute().await.expect("move");
        Ok(())
    })
    .await
    .expect("pair");
    peer.run(async |handle| {
        let far = up(&handle, "far").await;
        handle.address().add(far, PEER.into(), 24).execute().await.expect("address");
        handle.address().add(far, PEER6.into(), 64).execute().await.expect("address");
        Ok(())
    })
    .await
    .expect("peer");
    pod.run(async |handle| {
        up(&handle, "lo").await;
        let eth0 = up(&handle, "eth0").await;
        handle.address().add(eth0, POD.into(), 24).execute().await.expect("address");
        handle.address().add(eth0, POD6.into(), 64).execute().await.expect("address");
        let route = |message| handle.route().add(message).execute();
        // Its gateway is reached by a route that the kernel lists after it.
        let gateway = Ipv4Addr::new(169, 254, 1, 1);
        let on_link = RouteMessageBuilder::<Ipv4Addr>::new().destination_prefix(gateway, 32).output_interface(eth0);
        route(on_link.scope(RouteScope::Link).build()).await.expect("route");
        let default = RouteMessageBuilder::<Ipv4Addr>::new().gateway(gateway).output_interface(eth0).priority(5);
        route(default.build()).await.expect("route");
        route(RouteMessageBuilder::<Ipv6Addr>::new().gateway(PEER6).output_interface(eth0).build())
            .await
            .expect("route");
        let nowhere = Ipv4Addr::new(192, 0, 2, 0);
        let hole = RouteMessageBuilder::<Ipv4Addr>::new().destination_prefix(nowhere, 24).kind(RouteType::BlackHole);
        route(hole.build()).await.expect("route");
        let found = handle.neighbours().add(eth0, IpAddr::V4(gateway)).link_layer_address(&[2, 7, 0, 0, 0, 9]);
        found.execute().await.expect("neighbour");
        Ok(())
    })
    .await
    .expect("pod");
    (pod, peer)
}

/// All addresses of all interfaces but the loopback's.
async fn addresses(netns: &Netns) -> Vec<IpAddr> {
    let all = async |handle: Handle| link::list("addresses", handle.address().get().execute()).await;
    let address = |a| if let AddressAttribute::Address(ip) = a { Some(ip) } else { None };
    let all = netns.run(all).await.expect("list").into_iter();
    all.filter_map(|message| message.attributes.into_iter().find_map(address)).filter(|ip| !ip.is_loopback()).collect()
}

fn owner() -> Owner {
    Owner { sandbox: SANDBOX.into(), uid: UID }
}

async fn names(netns: &Netns) -> Vec<String> {
    let links = netns.run(async |handle| link::list("x", handle.link().get().execute()).await).await.expect("list");
    let name = |link: LinkMessage| {
        link.attributes.into_iter().find_map(|a| if let LinkAttribute::IfName(name) = a { Some(name) } else { None })
    };
    links.into_iter().filter_map(name).collect()
}

async fn qdiscs(netns: &Netns) -> usize {
    let ingress = async |handle: Handle| {
        let all = link::list("x", handle.qdisc().get().execute()).await?;
        Ok(all.iter().filter(|q| q.header.parent == rtnetlink::packet_route::tc::TcHandle::INGRESS).count())
    };
    netns.run(ingress).await.expect("list")
}

#[tokio::test]
async fn everything_that_was_set_is_carried() {
    let (pod, _peer) = pod().await;
    // The link's own is among them if the kernel has given it one by now.
    let before = addresses(&pod).await;
    let attached = attach(&pod, owner(), 3).await.expect("attach");
    assert_eq!(attached.nics.len(), 1);
    assert_eq!(attached.nics[0].mac, [2, 7, 0, 0, 0, 2]);
    let [eth0] = &attached.guest.interfaces[..] else { panic!("{:?}", attached.guest) };
    assert_eq!((eth0.name.as_str(), eth0.mtu, eth0.mac.len(), eth0.no_arp), ("eth0", 1400, 6, false));
    assert_eq!(eth0.ipv6["disable_ipv6"], "0");

    let addresses: Vec<_> = eth0.addresses.iter().map(|b| AddressMessage::parse(&b[..]).expect("address")).collect();
    let ip = |message: &AddressMessage| {
        message.attributes.iter().find_map(|a| if let AddressAttribute::Address(ip) = a { Some(*ip) } else { None })
    };
    let ips: Vec<_> = addresses.iter().filter_map(ip).collect();
    assert!(ips.contains(&POD.into()) && ips.contains(&POD6.into()), "{ips:?}");
    assert!(before.iter().all(|ip| ips.contains(ip)), "{before:?} {ips:?}");
    for address in &addresses {
        assert_eq!(address.header.index, 1, "by its place");
        let flags =
            address.attributes.iter().find_map(|a| if let AddressAttribute::Flags(f) = a { Some(*f) } else { None });
        assert_eq!(flags, Some(AddressFlags::Nodad));
    }

    let routes: Vec<_> = attached.guest.routes.iter().map(|b| RouteMessage::parse(&b[..]).expect("route")).collect();
    assert_eq!(routes.len(), 4, "not those of the kernel's own: {routes:?}");
    let gateway = |route: &RouteMessage| route.attributes.iter().any(|a| matches!(a, RouteAttribute::Gateway(_)));
    assert!(!gateway(&routes[0]) && !gateway(&routes[1]), "what a gateway is found by comes first");
    assert!(gateway(&routes[2]) && gateway(&routes[3]));
    assert!(
        routes[2].attributes.contains(&RouteAttribute::Priority(5))
            || routes[3].attributes.contains(&RouteAttribute::Priority(5))
    );
    let oif = |route: &RouteMessage| {
        route.attributes.iter().find_map(|a| if let RouteAttribute::Oif(index) = a { Some(*index) } else { None })
    };
    assert_eq!(routes.iter().filter_map(oif).collect::<Vec<_>>(), [1, 1, 1], "the black hole has none");

    let [neighbour] = &attached.guest.neighbours[..] else { panic!("{:?}", attached.guest) };
    assert_eq!(NeighbourMessage::parse(&neighbour[..]).expect("neighbour").header.ifindex, 1);
    assert!(attached.guest.rules.is_empty());
}

#[tokio::test]
async fn frames_pass_both_ways_and_nothing_is_left() {
    let (pod, peer) = pod().await;
    let attached = attach(&pod, owner(), 1).await.expect("attach");
    let name = attached.nics[0].tap.clone();
    assert_eq!((names(&pod).await.len(), qdiscs(&pod).await), (3, 2));

    // In the VMM's place: who has 10.7.0.1?
    let inside = File::open(pod.path()).expect("open");
    let answer = tokio::task::spawn_blocking(move || {
        std::thread::spawn(move || {
            setns(inside.as_fd(), CloneFlags::CLONE_NEWNET).expect("enter");
            let tap = tun_tap::Iface::without_packet_info(&name, tun_tap::Mode::Tap).expect("attach");
            let mut request = vec![0xff; 6];
            request.extend([2, 7, 0, 0, 0, 2, 8, 6, 0, 1, 8, 0, 6, 4, 0, 1, 2, 7, 0, 0, 0, 2]);
            request.extend(POD.octets());
            request.extend([0; 6]);
            request.extend(PEER.octets());
            tap.send(&request).expect("send");
            let mut frame = [0; 1514];
            loop {
                let n = tap.recv(&mut frame).expect("receive");
                // ARP, reply, from the peer's address.
                if frame[..n].get(12..14) == Some(&[8, 6]) && frame[21] == 2 {
                    return frame[28..32].to_vec();
                }
            }
        })
        .join()
        .expect("frames")
    });
    let answer =
        tokio::time::timeout(std::time::Duration::from_secs(10), answer).await.expect("in time").expect("answer");
    assert_eq!(answer, PEER.octets());

    let other = detach_in(&pod, "default/other").await;
    assert_eq!((other, names(&pod).await.len()), (Ok(()), 3), "not its own");
    assert_eq!(detach_in(&pod, SANDBOX).await, Ok(()));
    assert_eq!((names(&pod).await, qdiscs(&pod).await), (vec!["lo".to_owned(), "eth0".to_owned()], 0));
    assert_eq!(detach_in(&pod, SANDBOX).await, Ok(()), "again");
    // The interface works as before.
    let probe = File::open(peer.path()).expect("open");
    let reached = std::thread::spawn(move || {
        setns(probe.as_fd(), CloneFlags::CLONE_NEWNET).expect("enter");
        // Nobody listens, and the pod's own stack says so.
        std::net::TcpStream::connect((POD, 9)).expect_err("nobody listens").kind()
    });
    assert_eq!(reached.join().expect("probe"), io::ErrorKind::ConnectionRefused);
}

async fn detach_in(netns: &Netns, sandbox: &'static str) -> Result<(), String> {
    let netns = netns.clone();
    let detached = tokio::task::spawn_blocking(move || detach(&netns, sandbox)).await.expect("join");
    detached.map_err(|e| crate::chain(&e))
}

#[tokio::test]
async fn a_namespace_is_one_vms() {
    let (pod, _peer) = pod().await;
    attach(&pod, owner(), 3).await.expect("attach");
    let second = Owner { sandbox: "default/s2".into(), uid: UID };
    let error = attach(&pod, second, 3).await.expect_err("taken").to_string();
    assert_eq!(
        error,
        "carry interface eth0 into the VM: it has an ingress queueing discipline already, as of another VM's"
    );
    assert_eq!(detach_in(&pod, "default/s2").await, Ok(()));
    assert_eq!((names(&pod).await.len(), qdiscs(&pod).await), (3, 2), "the first goes on");

    let (foreign, _peer) = self::pod().await;
    let claim = async |handle: Handle| {
        let eth0 = index(&handle, "eth0").await.cast_signed();
        handle.qdisc().add(eth0).ingress().execute().await.expect("qdisc");
        Ok(())
    };
    foreign.run(claim).await.expect("claim");
    assert!(matches!(attach(&foreign, owner(), 3).await, Err(NetworkError::Taken(name)) if name == "eth0"));
    assert_eq!(detach_in(&foreign, SANDBOX).await, Ok(()));
    assert_eq!((names(&foreign).await.len(), qdiscs(&foreign).await), (2, 1), "what is somebody else's stays");
}

#[tokio::test]
async fn many_none_and_odd_interfaces() {
    let empty = namespace();
    assert!(attach(&empty, owner(), 0).await.expect("only lo").nics.is_empty());

    let add = async |handle: Handle| {
        for (name, peer) in [("eth0", "net1"), ("net2", "net3")] {
            // The peer is made first.
            handle.link().add(LinkVeth::new(name, peer).build()).execute().await.expect("veth");
        }
        up(&handle, "net1").await;
        up(&handle, "eth0").await;
        Ok(())
    };
    empty.run(add).await.expect("interfaces");
    let error = attach(&empty, owner(), 1).await.expect_err("too many").to_string();
    assert_eq!(error, "carry interfaces net1, eth0 into the VM: there is room for 1 network devices");
    assert_eq!(names(&empty).await.len(), 5, "nothing was made");
    let attached = attach(&empty, owner(), 2).await.expect("attach");
    let carried: Vec<_> = attached.guest.interfaces.iter().map(|i| i.name.as_str()).collect();
    assert_eq!(carried, ["net1", "eth0"], "one that is down is not");

    let odd = namespace();
    let inside = File::open(odd.path()).expect("open");
    let tun = std::thread::spawn(move || {
        setns(inside.as_fd(), CloneFlags::CLONE_NEWNET).expect("enter");
        tun_tap::Iface::new("tun0", tun_tap::Mode::Tun).expect("tun")
    });
    let tun = tun.join().expect("tun");
    odd.run(async |handle| Ok(up(&handle, "tun0").await)).await.expect("up");
    let error = attach(&odd, owner(), 3).await.expect_err("no Ethernet").to_string();
    assert!(error.starts_with("carry interface tun0 into the VM: it is no Ethernet interface ("), "{error}");
    drop(tun);
}

#[tokio::test]
async fn the_loopback_leads_to_the_shim() {
    let (pod, _peer) = pod().await;
    let connect = async |ip: IpAddr| {
        let inside = File::open(pod.path()).expect("open");
        let thread = std::thread::spawn(move || {
            setns(inside.as_fd(), CloneFlags::CLONE_NEWNET).expect("enter");
            std::net::TcpStream::connect((ip, 4242)).map_err(|e| e.kind())
        });
        tokio::task::spawn_blocking(move || thread.join().expect("connect")).await.expect("join")
    };
    let doors = forward::open(&pod).await.expect("open");
    for (number, ip) in
        [Ipv4Addr::LOCALHOST.into(), IpAddr::from(Ipv6Addr::LOCALHOST), POD.into()].into_iter().enumerate()
    {
        let client = connect(ip).await.expect("accepted");
        let listener = doors.listener(number % 2).try_clone().expect("clone");
        let (server, from) =
            tokio::net::TcpListener::from_std(listener).expect("watch").accept().await.expect("accept");
        assert_eq!(forward::destination(&server).expect("destination"), (ip, 4242).into());
        assert_eq!(client.local_addr().expect("address").port(), from.port());
    }
    drop(doors);
    // The kernel takes the table away a moment after its socket.
    let mut closed = Ok(());
    for _ in 0..100 {
        match connect(Ipv4Addr::LOCALHOST.into()).await {
            Err(kind) => {
                closed = Err(kind);
                break;
            }
            Ok(_) => tokio::time::sleep(std::time::Duration::from_millis(20)).await,
        }
    }
    assert_eq!(closed, Err(io::ErrorKind::ConnectionRefused));
}
