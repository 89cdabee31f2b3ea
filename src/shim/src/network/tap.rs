//! Taps, and the redirection between them and the interfaces: tc(8)'s ingress queueing discipline with a filter that matches
//! everything and the action mirred, on both. The kernel hands each frame over where it enters, before anything of the
//! namespace's own network stack sees it.

use std::{fs, io};

use rtnetlink::packet_route::link::{LinkAttribute, LinkMessage};
use rtnetlink::packet_route::tc::TcHandle;
use rtnetlink::{Error, Handle, LinkUnspec};
use rustix::io::Errno;
use tappers::Interface;
use tappers::linux::Tap;

use super::link::{asked, cause, list};
use super::snapshot::Link;
use super::{NetworkError, Owner};

/// Parent of the filters of an ingress queueing discipline: TC_H_INGRESS with minor 0 (`linux/pkt_sched.h`).
const INGRESS: u32 = 0xffff_0000;
/// Every protocol: ETH_P_ALL in network byte order (`linux/if_ether.h`).
const ALL: u16 = 0x0003_u16.to_be();
/// What the names of taps begin with; the index of the interface follows.
const PREFIX: &str = "nacelle";
/// In front of the sandbox in a tap's alias.
const ALIAS: &str = "nacelle sandbox ";

/// Makes a tap for an interface, and lets each lead to the other. Returns the tap's name.
pub async fn attach(handle: &Handle, link: &Link, owner: &Owner) -> Result<String, NetworkError> {
    let name = format!("{PREFIX}{}", link.index);
    let making = |source| NetworkError::Request { what: format!("make tap {name}"), source };
    let taken = |source: io::Error, what| match source.kind() {
        io::ErrorKind::ResourceBusy | io::ErrorKind::AlreadyExists => NetworkError::Taken(link.name.clone()),
        _ => NetworkError::Request { what, source },
    };
    let tap = Interface::new(&name).and_then(Tap::create_named);
    let tap = tap.map_err(|e| taken(e, format!("make tap {name}")))?;
    tap.set_owner(owner.uid).map_err(making)?;
    // The tap itself has nothing to say: no address, no discovery. A kernel without IPv6 has no such file.
    let _ = fs::write(format!("/proc/sys/net/ipv6/conf/{name}/disable_ipv6"), "1");
    let made = list("taps", handle.link().get().match_name(name.clone()).execute()).await?;
    let index = made.first().map(|message| message.header.index).unwrap_or_default();
    let alias = LinkAttribute::IfAlias(format!("{ALIAS}{}", owner.sandbox));
    let set = LinkUnspec::new_with_index(index).mtu(link.mtu).append_extra_attribute(alias).up().build();
    handle.link().set(set).execute().await.map_err(asked(format!("set tap {name} up")))?;
    let ingress = |index: u32| handle.qdisc().add(index.cast_signed()).ingress().execute();
    let what = format!("redirect interface {} to tap {name}", link.name);
    // The claim on the interface. Where it fails the tap goes with its descriptor.
    ingress(link.index).await.map_err(|e| taken(cause(e), what.clone()))?;
    // From here on `detach` finds both.
    tap.set_persistent(true).map_err(making)?;
    redirect(handle, link.index, index).await.map_err(asked(what))?;
    let what = format!("redirect tap {name} to interface {}", link.name);
    ingress(index).await.map_err(asked(what.clone()))?;
    redirect(handle, index, link.index).await.map_err(asked(what))?;
    Ok(name)
}

/// Hands everything that enters by `from` over to where `to` sends.
async fn redirect(handle: &Handle, from: u32, to: u32) -> Result<(), Error> {
    let filter = handle.traffic_filter(from.cast_signed()).add();
    filter.parent(INGRESS).protocol(ALL).redirect(to)?.execute().await
}

/// Removes the taps of a sandbox, and the redirection from the interfaces that they belong to.
pub async fn detach(handle: &Handle, sandbox: &str) -> Result<(), NetworkError> {
    let alias = format!("{ALIAS}{sandbox}");
    let links = list("interfaces", handle.link().get().execute()).await?;
    for tap in links.iter().filter(|link| text(link, |a| matches!(a, LinkAttribute::IfAlias(t) if *t == alias))) {
        let name = tap.attributes.iter().find_map(|a| match a {
            LinkAttribute::IfName(name) => Some(name.as_str()),
            _ => None,
        });
        let Some(name) = name else { continue };
        if let Some(index) = name.strip_prefix(PREFIX).and_then(|number| number.parse::<i32>().ok()) {
            let mut request = handle.qdisc().del(index);
            request.message_mut().header.parent = TcHandle::INGRESS;
            gone_is_fine(request.execute().await).map_err(asked(format!("stop redirection to tap {name}")))?;
        }
        let removed = handle.link().del(tap.header.index).execute().await;
        gone_is_fine(removed).map_err(asked(format!("remove tap {name}")))?;
    }
    Ok(())
}

fn text(link: &LinkMessage, wanted: impl Fn(&LinkAttribute) -> bool) -> bool {
    link.attributes.iter().any(wanted)
}

/// The interface, its queueing discipline or all of it may have been removed by its maker.
fn gone_is_fine(result: Result<(), Error>) -> Result<(), Error> {
    match result {
        Err(Error::NetlinkError(message)) => match Errno::from_io_error(&message.to_io()) {
            Some(Errno::NODEV | Errno::NOENT | Errno::INVAL) => Ok(()),
            _ => Err(Error::NetlinkError(message)),
        },
        other => other,
    }
}
