//! The pod's network, as the host says it is: names, hardware addresses and MTUs of the devices, addresses, routes,
//! neighbours and rules, in the bytes of rtnetlink(7). Everything was in force on the host a moment ago, so nothing is
//! waited for and nothing is negotiated.

use std::path::Path;
use std::{fs, io};

use futures::{StreamExt, TryStreamExt};
use nacelle_protocol::agent::{Interface, Network};
use rtnetlink::packet_core::{
    DecodeError, NLM_F_ACK, NLM_F_CREATE, NLM_F_EXCL, NLM_F_REQUEST, NetlinkMessage, NetlinkPayload, Parseable,
};
use rtnetlink::packet_route::RouteNetlinkMessage;
use rtnetlink::packet_route::address::{AddressAttribute, AddressMessage};
use rtnetlink::packet_route::link::LinkAttribute;
use rtnetlink::packet_route::neighbour::NeighbourMessage;
use rtnetlink::packet_route::route::{RouteAttribute, RouteMessage};
use rtnetlink::packet_route::rule::RuleMessage;
use rtnetlink::{Handle, LinkUnspec};
use rustix::io::Errno;
use thiserror::Error;

/// Why the network is not as the host said.
#[derive(Debug, Error)]
pub enum NetworkError {
    /// No netlink socket.
    #[error("open netlink")]
    Open(#[source] io::Error),
    /// The machine has another number of devices than the host has said.
    #[error("find network devices: there are {found}, not {wanted}")]
    Devices {
        /// What the machine has.
        found: usize,
        /// What the host has said.
        wanted: usize,
    },
    /// A name that is no file name.
    #[error("name interface {0:?}: not a name")]
    Name(String),
    /// A message that is not laid out as rtnetlink's are.
    #[error("read {what} of the host's")]
    Decode {
        /// What it should be.
        what: &'static str,
        /// What is wrong with it.
        #[source]
        source: DecodeError,
    },
    /// An interface that the host has not listed.
    #[error("read {what} of the host's: there is no interface {place}")]
    Place {
        /// What names it.
        what: &'static str,
        /// Its place.
        place: u32,
    },
    /// The kernel refuses.
    #[error("{0}")]
    Request(String, #[source] io::Error),
}

fn cause(error: rtnetlink::Error) -> io::Error {
    match error {
        rtnetlink::Error::NetlinkError(message) => message.to_io(),
        other => io::Error::other(other),
    }
}

fn asked(what: impl Into<String>) -> impl FnOnce(rtnetlink::Error) -> NetworkError {
    move |error| NetworkError::Request(what.into(), cause(error))
}

/// Makes the network of the calling thread's namespace what the host says.
///
/// # Errors
/// [`NetworkError`] names the first thing that could not be done.
pub async fn configure(network: &Network) -> Result<(), NetworkError> {
    if network.interfaces.is_empty() {
        return Ok(());
    }
    let (connection, handle, _) = rtnetlink::new_connection().map_err(NetworkError::Open)?;
    let connection = tokio::spawn(connection);
    let result = async { apply(&handle, network, devices(&handle).await?).await };
    let result = result.await;
    connection.abort();
    result
}

async fn apply(handle: &Handle, network: &Network, devices: Vec<Device>) -> Result<(), NetworkError> {
    if devices.len() != network.interfaces.len() {
        return Err(NetworkError::Devices { found: devices.len(), wanted: network.interfaces.len() });
    }
    rename(handle, &devices, &network.interfaces).await?;
    let indexes: Vec<u32> = devices.iter().map(|device| device.index).collect();
    for (index, interface) in indexes.iter().zip(&network.interfaces) {
        bring_up(handle, *index, interface).await?;
    }
    // Before routes, which name addresses as their source.
    for message in network.interfaces.iter().flat_map(|interface| &interface.addresses) {
        let mut address = parse::<AddressMessage>("an address", message)?;
        address.header.index = index("an address", &indexes, address.header.index)?;
        let text = address.attributes.iter().find_map(|a| match a {
            AddressAttribute::Local(ip) | AddressAttribute::Address(ip) => Some(ip.to_string()),
            _ => None,
        });
        let what = format!("add address {}/{}", text.unwrap_or_default(), address.header.prefix_len);
        add(handle, RouteNetlinkMessage::NewAddress(address), what).await?;
    }
    for message in &network.neighbours {
        let mut neighbour = parse::<NeighbourMessage>("a neighbour", message)?;
        neighbour.header.ifindex = index("a neighbour", &indexes, neighbour.header.ifindex)?;
        let what = format!("add neighbour {:?}", neighbour.attributes);
        add(handle, RouteNetlinkMessage::NewNeighbour(neighbour), what).await?;
    }
    for message in &network.rules {
        let rule = parse::<RuleMessage>("a rule", message)?;
        let what = format!("add rule {:?}", rule.attributes);
        add(handle, RouteNetlinkMessage::NewRule(rule), what).await?;
    }
    for message in &network.routes {
        let mut route = parse::<RouteMessage>("a route", message)?;
        for attribute in &mut route.attributes {
            match attribute {
                RouteAttribute::Oif(place) => *place = index("a route", &indexes, *place)?,
                RouteAttribute::MultiPath(hops) => {
                    for hop in hops {
                        hop.interface_index = index("a route", &indexes, hop.interface_index)?;
                    }
                }
                _ => {}
            }
        }
        let what = format!("add route /{} {:?}", route.header.destination_prefix_length, route.attributes);
        add(handle, RouteNetlinkMessage::NewRoute(route), what).await?;
    }
    Ok(())
}

struct Device {
    index: u32,
    name: String,
}

/// The machine's devices, in the order in which it has them: that is the order of their indexes. Those that the kernel
/// makes by itself, such as for tunnels, stand for no device.
async fn devices(handle: &Handle) -> Result<Vec<Device>, NetworkError> {
    let links: Vec<_> = handle.link().get().execute().try_collect().await.map_err(asked("list interfaces"))?;
    let mut devices: Vec<_> = links
        .iter()
        .filter_map(|link| {
            let name = link.attributes.iter().find_map(|a| match a {
                LinkAttribute::IfName(name) => Some(name.clone()),
                _ => None,
            })?;
            let real = Path::new("/sys/class/net").join(&name).join("device").exists();
            real.then_some(Device { index: link.header.index, name })
        })
        .collect();
    devices.sort_by_key(|device| device.index);
    Ok(devices)
}

/// Gives the devices their names, all of which are free but for those that other devices still have.
async fn rename(handle: &Handle, devices: &[Device], interfaces: &[Interface]) -> Result<(), NetworkError> {
    let wrong = || devices.iter().zip(interfaces).filter(|(device, interface)| device.name != interface.name);
    let conflict = wrong().any(|(_, interface)| devices.iter().any(|device| device.name == interface.name));
    for (number, (device, _)) in wrong().enumerate().filter(|_| conflict) {
        let aside = LinkUnspec::new_with_index(device.index).name(format!("aside{number}")).build();
        handle.link().set(aside).execute().await.map_err(asked("set a name aside"))?;
    }
    for (device, interface) in wrong() {
        let named = LinkUnspec::new_with_index(device.index).name(interface.name.clone()).build();
        handle.link().set(named).execute().await.map_err(asked(format!("name interface {:?}", interface.name)))?;
    }
    Ok(())
}

async fn bring_up(handle: &Handle, index: u32, interface: &Interface) -> Result<(), NetworkError> {
    let name = &interface.name;
    // It becomes a part of a path.
    if name.is_empty() || name.contains('/') || name.starts_with('.') {
        return Err(NetworkError::Name(name.chars().take(16).collect()));
    }
    let settings = Path::new("/proc/sys/net/ipv6/conf").join(name);
    // The host's addresses come with their link-local one: the kernel is not to make another.
    let made = ("addr_gen_mode".to_owned(), "1".to_owned());
    for (setting, value) in interface.ipv6.iter().chain([(&made.0, &made.1)]) {
        let path = settings.join(setting);
        match fs::write(&path, value) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => {
                return Err(NetworkError::Request(format!("write {}", path.display()), e));
            }
            _ => {}
        }
    }
    let link = LinkUnspec::new_with_index(index)
        .address(interface.mac.clone())
        .mtu(interface.mtu)
        .arp(!interface.no_arp)
        .up()
        .build();
    handle.link().set(link).execute().await.map_err(asked(format!("set interface {name} up")))
}

fn parse<T: Parseable<[u8]>>(what: &'static str, bytes: &[u8]) -> Result<T, NetworkError> {
    T::parse(bytes).map_err(|source| NetworkError::Decode { what, source })
}

fn index(what: &'static str, indexes: &[u32], place: u32) -> Result<u32, NetworkError> {
    let found = place.checked_sub(1).and_then(|place| indexes.get(place as usize));
    found.copied().ok_or(NetworkError::Place { what, place })
}

/// Adds something; that it is there already is as good.
async fn add(handle: &Handle, message: RouteNetlinkMessage, what: String) -> Result<(), NetworkError> {
    let mut request = NetlinkMessage::from(message);
    request.header.flags = NLM_F_REQUEST | NLM_F_ACK | NLM_F_CREATE | NLM_F_EXCL;
    let mut answers = handle.clone().request(request).map_err(asked(what.clone()))?;
    while let Some(answer) = answers.next().await {
        if let NetlinkPayload::Error(error) = answer.payload {
            match error.to_io() {
                exists if Errno::from_io_error(&exists) == Some(Errno::EXIST) => {}
                source => return Err(NetworkError::Request(what, source)),
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

    use nix::sched::{CloneFlags, unshare};
    use rtnetlink::packet_core::Emitable;
    use rtnetlink::packet_route::address::AddressFlags;
    use rtnetlink::packet_route::link::LinkMessage;
    use rtnetlink::{AddressMessageBuilder, LinkVeth, RouteMessageBuilder};

    use super::*;

    fn bytes(message: &impl Emitable) -> Vec<u8> {
        let mut out = vec![0; message.buffer_len()];
        message.emit(&mut out);
        out
    }

    /// Runs `test` in a network namespace of its own with two interfaces, eth0 and eth1. Needs root.
    fn with_two(test: impl AsyncFnOnce(Handle, Vec<Device>) + Send + 'static) {
        let thread = std::thread::spawn(move || {
            unshare(CloneFlags::CLONE_NEWNET).expect("unshare: run these tests as root");
            let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build().expect("runtime");
            runtime.block_on(async {
                let (connection, handle, _) = rtnetlink::new_connection().expect("netlink");
                tokio::spawn(connection);
                // The peer is made first.
                handle.link().add(LinkVeth::new("eth1", "eth0").build()).execute().await.expect("veth");
                let devices = links(&handle).await;
                let device = |(link, name): &(LinkMessage, String)| {
                    name.starts_with("eth").then(|| Device { index: link.header.index, name: name.clone() })
                };
                let mut devices: Vec<_> = devices.iter().filter_map(device).collect();
                devices.sort_by_key(|device| device.index);
                test(handle, devices).await;
            });
        });
        thread.join().expect("test");
    }

    async fn links(handle: &Handle) -> Vec<(LinkMessage, String)> {
        let links: Vec<LinkMessage> = handle.link().get().execute().try_collect().await.expect("list");
        let name = |link: &LinkMessage| {
            link.attributes
                .iter()
                .find_map(|a| if let LinkAttribute::IfName(name) = a { Some(name.clone()) } else { None })
        };
        links.into_iter().map(|link| (link.clone(), name(&link).expect("a name"))).collect()
    }

    fn address(ip: IpAddr, place: u32) -> Vec<u8> {
        let mut message = match ip {
            IpAddr::V4(ip) => AddressMessageBuilder::<Ipv4Addr>::new().index(place).address(ip, 24).build(),
            IpAddr::V6(ip) => AddressMessageBuilder::<Ipv6Addr>::new().index(place).address(ip, 64).build(),
        };
        message.attributes.push(AddressAttribute::Flags(AddressFlags::Nodad));
        bytes(&message)
    }

    fn interface(name: &str, last: u8, addresses: Vec<Vec<u8>>) -> Interface {
        let mac = vec![2, 0, 0, 0, 0, last];
        Interface { name: name.into(), mac, mtu: 1300, addresses, ..Interface::default() }
    }

    #[test]
    fn two_interfaces_that_swap_a_name() {
        with_two(async |handle, devices| {
            let v4 = Ipv4Addr::new(10, 5, 0, 2);
            let v6 = Ipv6Addr::new(0xfd05, 0, 0, 0, 0, 0, 0, 2);
            let (gateway, far) = (Ipv4Addr::new(10, 5, 0, 1), Ipv4Addr::new(192, 0, 2, 0));
            let route = RouteMessageBuilder::<Ipv4Addr>::new().destination_prefix(far, 24).gateway(gateway);
            let network = Network {
                interfaces: vec![
                    interface("net1", 1, vec![]),
                    interface("eth0", 2, vec![address(v4.into(), 2), address(v6.into(), 2)]),
                ],
                routes: vec![bytes(&route.output_interface(2).build())],
                ..Network::default()
            };
            let second = devices[1].index;
            apply(&handle, &network, devices).await.expect("apply");
            let found = links(&handle).await;
            let eth0 = &found.iter().find(|(_, name)| name == "eth0").expect("eth0").0;
            assert_eq!(eth0.header.index, second, "the second device is eth0 now");
            assert!(eth0.attributes.contains(&LinkAttribute::Mtu(1300)));
            assert!(eth0.attributes.contains(&LinkAttribute::Address(vec![2, 0, 0, 0, 0, 2])));
            let addresses: Vec<_> = handle.address().get().execute().try_collect().await.expect("list");
            let has = |ip: IpAddr| {
                let of = |m: &AddressMessage| m.attributes.contains(&AddressAttribute::Address(ip));
                addresses.iter().any(|m| m.header.index == second && of(m))
            };
            assert!(has(v4.into()) && has(v6.into()), "{addresses:?}");
            let all = RouteMessageBuilder::<Ipv4Addr>::new().build();
            let routes: Vec<_> = handle.route().get(all).execute().try_collect().await.expect("list");
            let ours = |r: &RouteMessage| r.attributes.contains(&RouteAttribute::Gateway(IpAddr::from(gateway).into()));
            assert!(routes.iter().any(ours), "{routes:?}");
        });
    }

    #[test]
    fn what_makes_no_sense_is_named() {
        with_two(async |handle, devices| {
            let again = || devices.iter().map(|d| Device { index: d.index, name: d.name.clone() }).collect::<Vec<_>>();
            let apply = async |first: Interface, routes: Vec<Vec<u8>>, devices: Vec<Device>| {
                let interfaces = vec![first, interface("eth1", 2, vec![])];
                let network = Network { interfaces, routes, ..Network::default() };
                super::apply(&handle, &network, devices).await.expect_err("refused").to_string()
            };
            let plain = || interface("eth0", 1, vec![]);
            let one = again().into_iter().take(1).collect();
            assert_eq!(apply(plain(), vec![], one).await, "find network devices: there are 1, not 2");
            let error = apply(plain(), vec![vec![1, 2, 3]], again()).await;
            assert_eq!(error, "read a route of the host's");
            let stray = interface("eth0", 1, vec![address(Ipv4Addr::new(10, 5, 0, 2).into(), 3)]);
            assert_eq!(apply(stray, vec![], again()).await, "read an address of the host's: there is no interface 3");
            let nowhere =
                RouteMessageBuilder::<Ipv4Addr>::new().gateway(Ipv4Addr::new(10, 6, 0, 1)).output_interface(1);
            let error = apply(plain(), vec![bytes(&nowhere.build())], again()).await;
            assert!(error.starts_with("add route /0 "), "{error}");
        });
    }
}
