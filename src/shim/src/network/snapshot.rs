//! What a network namespace holds, and what of it the guest gets.
//!
//! | on the host                                            | in the guest                                             |
//! |--------------------------------------------------------|----------------------------------------------------------|
//! | an Ethernet interface that is up                       | a device of the same name, MAC and MTU                   |
//! | one that is down, and the loopback                     | nothing; the guest has a loopback of its own             |
//! | one that is up and of another kind                     | refused: its packets would be lost without a word        |
//! | its addresses                                          | the same, without duplicate address detection            |
//! | routes that somebody has set, policy rules             | the same                                                 |
//! | routes that the kernel makes of addresses              | made by the guest's kernel                               |
//! | neighbours that somebody has set                       | the same                                                 |
//! | neighbours that were found                             | found again                                              |

use std::collections::HashMap;
use std::fs;
use std::net::Ipv4Addr;
use std::net::Ipv6Addr;

use nacelle_protocol::agent;
use rtnetlink::packet_core::Emitable;
use rtnetlink::packet_route::AddressFamily;
use rtnetlink::packet_route::address::{AddressAttribute, AddressFlags, AddressHeaderFlags, AddressMessage};
use rtnetlink::packet_route::link::{LinkAttribute, LinkFlags, LinkLayerType, LinkMessage};
use rtnetlink::packet_route::neighbour::{NeighbourAttribute, NeighbourMessage, NeighbourState};
use rtnetlink::packet_route::route::{
    RouteAttribute, RouteFlags, RouteHeader, RouteMessage, RouteNextHopFlags, RouteProtocol, RouteType,
};
use rtnetlink::packet_route::rule::{RuleAttribute, RuleMessage};
use rtnetlink::{Handle, IpVersion, RouteMessageBuilder};

use super::NetworkError;
use super::link::list;

/// Table "local", which only the kernel writes.
const TABLE_LOCAL: u32 = 255;
/// Rules that every namespace has: local, main and default.
const OWN_RULES: [u32; 3] = [0, 32766, 32767];
/// Settings of an interface below net.ipv6.conf that are taken over.
const IPV6: [&str; 4] = ["disable_ipv6", "accept_ra", "autoconf", "forwarding"];

/// An interface that is carried.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Link {
    /// Its index in the namespace.
    pub index: u32,
    /// Its name.
    pub name: String,
    /// Its hardware address.
    pub mac: [u8; 6],
    /// The longest packet, in bytes.
    pub mtu: u32,
}

/// What is carried.
#[derive(Clone, Debug, Default)]
pub struct Snapshot {
    /// Interfaces, by index.
    pub links: Vec<Link>,
    /// What the guest is told, interfaces in the same order.
    pub guest: agent::Network,
}

/// What the kernel lists.
#[derive(Debug, Default)]
struct Listed {
    links: Vec<LinkMessage>,
    addresses: Vec<AddressMessage>,
    routes: Vec<RouteMessage>,
    neighbours: Vec<NeighbourMessage>,
    rules: Vec<RuleMessage>,
}

/// The interfaces that would be carried.
///
/// # Errors
/// [`NetworkError`].
pub async fn interfaces(handle: &Handle) -> Result<Vec<Link>, NetworkError> {
    carried(&list("interfaces", handle.link().get().execute()).await?)
}

/// Reads the namespace of `handle`; the calling thread must be in it.
///
/// # Errors
/// [`NetworkError`].
pub async fn read(handle: &Handle) -> Result<Snapshot, NetworkError> {
    let links = list("interfaces", handle.link().get().execute()).await?;
    let mut listed = Listed { links, ..Listed::default() };
    if carried(&listed.links)?.is_empty() {
        return Ok(Snapshot::default());
    }
    listed.addresses = list("addresses", handle.address().get().execute()).await?;
    listed.neighbours = list("neighbours", handle.neighbours().get().execute()).await?;
    let (v4, v6) = (RouteMessageBuilder::<Ipv4Addr>::new().build(), RouteMessageBuilder::<Ipv6Addr>::new().build());
    for (routes, version) in [(v4, IpVersion::V4), (v6, IpVersion::V6)] {
        listed.routes.extend(list("routes", handle.route().get(routes).execute()).await?);
        listed.rules.extend(list("rules", handle.rule().get(version).execute()).await?);
    }
    let mut snapshot = assemble(listed)?;
    for interface in &mut snapshot.guest.interfaces {
        for setting in IPV6 {
            // A kernel without IPv6 has none of them.
            let path = format!("/proc/sys/net/ipv6/conf/{}/{setting}", interface.name);
            if let Ok(value) = fs::read_to_string(path) {
                interface.ipv6.insert(setting.to_owned(), value.trim().to_owned());
            }
        }
    }
    Ok(snapshot)
}

fn carried(links: &[LinkMessage]) -> Result<Vec<Link>, NetworkError> {
    let mut carried = Vec::new();
    for link in links {
        let flags = link.header.flags;
        if flags.contains(LinkFlags::Loopback) || !flags.contains(LinkFlags::Up) {
            continue;
        }
        let (mut name, mut mtu, mut mac) = (String::new(), 0, None);
        for attribute in &link.attributes {
            match attribute {
                LinkAttribute::IfName(text) => name.clone_from(text),
                LinkAttribute::Mtu(bytes) => mtu = *bytes,
                LinkAttribute::Address(bytes) => mac = bytes.as_slice().try_into().ok(),
                _ => {}
            }
        }
        match (link.header.link_layer_type, mac) {
            (LinkLayerType::Ether, Some(mac)) => carried.push(Link { index: link.header.index, name, mac, mtu }),
            (kind, _) => return Err(NetworkError::Kind { name, kind: kind.to_string() }),
        }
    }
    carried.sort_by_key(|link| link.index);
    Ok(carried)
}

fn assemble(listed: Listed) -> Result<Snapshot, NetworkError> {
    let links = carried(&listed.links)?;
    let places: HashMap<u32, u32> = links.iter().zip(1..).map(|(link, place)| (link.index, place)).collect();
    let no_arp = |index| {
        let link = listed.links.iter().find(|link| link.header.index == index);
        link.is_some_and(|link| link.header.flags.contains(LinkFlags::Noarp))
    };
    let mut interfaces: Vec<_> = links
        .iter()
        .map(|link| agent::Interface {
            name: link.name.clone(),
            mac: link.mac.to_vec(),
            mtu: link.mtu,
            no_arp: no_arp(link.index),
            ..Default::default()
        })
        .collect();
    for message in listed.addresses {
        let Some(place) = places.get(&message.header.index).copied() else { continue };
        interfaces[place as usize - 1].addresses.push(bytes(&address(message, place)));
    }
    let mut routes: Vec<_> = listed.routes.into_iter().filter_map(|message| route(message, &places)).collect();
    // A gateway is found by the routes that are there already.
    routes.sort_by_key(|route| {
        let gateway = route
            .attributes
            .iter()
            .any(|a| matches!(a, RouteAttribute::Gateway(_) | RouteAttribute::Via(_) | RouteAttribute::MultiPath(_)));
        (gateway, 128 - route.header.destination_prefix_length.min(128))
    });
    let neighbours = listed.neighbours.into_iter().filter_map(|message| neighbour(message, &places));
    let rules = listed.rules.into_iter().filter(|rule| {
        let priority = rule.attributes.iter().find_map(|a| match a {
            RuleAttribute::Priority(priority) => Some(*priority),
            _ => None,
        });
        !OWN_RULES.contains(&priority.unwrap_or(0))
    });
    let guest = agent::Network {
        interfaces,
        routes: routes.iter().map(bytes).collect(),
        neighbours: neighbours.map(|message| bytes(&message)).collect(),
        rules: rules.map(|message| bytes(&message)).collect(),
        ..Default::default()
    };
    Ok(Snapshot { links, guest })
}

fn bytes(message: &impl Emitable) -> Vec<u8> {
    let mut out = vec![0; message.buffer_len()];
    message.emit(&mut out);
    out
}

/// The address is in use on this very link already, so the guest need not ask whether somebody has it.
fn address(mut message: AddressMessage, place: u32) -> AddressMessage {
    const KEPT: AddressFlags =
        AddressFlags::Noprefixroute.union(AddressFlags::Homeaddress).union(AddressFlags::Managetempaddr);
    let mut flags = AddressFlags::from_bits_retain(message.header.flags.bits().into());
    for attribute in &message.attributes {
        if let AddressAttribute::Flags(all) = attribute {
            flags = *all;
        }
    }
    message.header.index = place;
    message.header.flags = AddressHeaderFlags::empty();
    message.attributes.retain(|attribute| {
        use AddressAttribute::{Address, Broadcast, CacheInfo, Local, RoutePriority};
        matches!(attribute, Address(_) | Local(_) | Broadcast(_) | CacheInfo(_) | RoutePriority(_))
    });
    message.attributes.push(AddressAttribute::Flags(flags & KEPT | AddressFlags::Nodad));
    message
}

/// A route that somebody has set, and that leads to nowhere or to interfaces that are carried.
fn route(mut message: RouteMessage, places: &HashMap<u32, u32>) -> Option<RouteMessage> {
    let header = &mut message.header;
    if matches!(header.protocol, RouteProtocol::Kernel | RouteProtocol::IcmpRedirect | RouteProtocol::Ra)
        || header.flags.contains(RouteFlags::Cloned)
    {
        return None;
    }
    let nowhere = match header.kind {
        RouteType::Unicast => false,
        RouteType::BlackHole | RouteType::Unreachable | RouteType::Prohibit | RouteType::Throw => true,
        _ => return None,
    };
    header.flags &= RouteFlags::Onlink;
    let mut led = nowhere;
    let mut table = u32::from(header.table);
    let mut kept = Vec::with_capacity(message.attributes.len());
    for attribute in message.attributes {
        use RouteAttribute::{
            Destination, Gateway, Mark, Metrics, MultiPath, Oif, PrefSource, Preference, Priority, Source, Table, Via,
        };
        match attribute {
            // Where a route leads to nowhere the kernel names the loopback.
            Oif(_) if nowhere => {}
            Oif(index) => {
                kept.push(Oif(*places.get(&index)?));
                led = true;
            }
            MultiPath(mut hops) => {
                for hop in &mut hops {
                    hop.interface_index = *places.get(&hop.interface_index)?;
                    hop.flags &= RouteNextHopFlags::Onlink;
                }
                kept.push(MultiPath(hops));
                led = true;
            }
            Table(number) => {
                table = number;
                kept.push(Table(number));
            }
            kind @ (Destination(_) | Source(_) | Gateway(_) | Via(_) | PrefSource(_) | Priority(_) | Metrics(_)
            | Preference(_) | Mark(_)) => kept.push(kind),
            _ => {}
        }
    }
    message.attributes = kept;
    let unspecified = table == u32::from(RouteHeader::RT_TABLE_UNSPEC);
    (led && table != TABLE_LOCAL && !unspecified).then_some(message)
}

fn neighbour(mut message: NeighbourMessage, places: &HashMap<u32, u32>) -> Option<NeighbourMessage> {
    let header = &mut message.header;
    let ip = matches!(header.family, AddressFamily::Inet | AddressFamily::Inet6);
    if !ip || header.state != NeighbourState::Permanent {
        return None;
    }
    header.ifindex = *places.get(&header.ifindex)?;
    message.attributes.retain(|attribute| {
        matches!(attribute, NeighbourAttribute::Destination(_) | NeighbourAttribute::LinkLayerAddress(_))
    });
    Some(message)
}
