//! One nftables table in the pod's namespace: connections that somebody inside makes over the loopback go to the shim.
//!
//! ```text
//!  table inet nacelle {            flags owner: it goes with the socket that made it, and so with the shim
//!    chain loopback { type nat hook output priority dstnat
//!      oif 1 meta l4proto tcp meta nfproto ipv4 redirect to :PORT of the listener on 127.0.0.1
//!      oif 1 meta l4proto tcp meta nfproto ipv6 redirect to :PORT of the listener on ::1
//!  } }
//! ```

use std::io;

use netlink_packet_netfilter::nftables::{
    ChainAttribute, ChainMessage, Cmp, DataAttribute, ExpressionAttribute, Expressions, Hook, Immediate,
    InetHookNumber, ListAttribute, Meta, MetaKey, NfTablesMessage, Operator, Register, RuleAttribute, RuleMessage,
    TableAttribute, TableFlags, TableMessage,
};
use netlink_packet_netfilter::none::ControlMessage;
use netlink_packet_netfilter::{NetfilterHeader, NetfilterMessage, NetfilterMessageInner, NetfilterProtoFamily};
use rtnetlink::packet_core::{
    DefaultNla, NLM_F_ACK, NLM_F_APPEND, NLM_F_CREATE, NLM_F_REQUEST, NetlinkBuffer, NetlinkMessage, NetlinkPayload,
    Parseable,
};
use rtnetlink::sys::protocols::NETLINK_NETFILTER;
use rtnetlink::sys::{Socket, SocketAddr};

const TABLE: &str = "nacelle";
const CHAIN: &str = "loopback";
/// NFNL_SUBSYS_NFTABLES (`linux/netfilter/nfnetlink.h`).
const SUBSYSTEM: u16 = 10;
/// NF_IP_PRI_NAT_DST (`linux/netfilter_ipv4.h`).
const PRIORITY: i32 = -100;
/// The loopback is the first interface of every namespace.
const LOOPBACK: u32 = 1;
/// IPPROTO_TCP.
const TCP: u8 = 6;
/// NFPROTO_IPV4 and NFPROTO_IPV6 (`linux/netfilter.h`).
const FAMILIES: [u8; 2] = [2, 10];
/// NFTA_REDIR_REG_PROTO_MIN (`linux/netfilter/nf_tables.h`).
const REDIR_PORT: u16 = 1;

/// The table, for as long as the value lives.
#[derive(Debug)]
pub struct Redirection(#[expect(dead_code, reason = "held, not used")] Socket);

impl Redirection {
    /// Redirects in the calling thread's namespace, to the ports of the listeners on 127.0.0.1 and ::1.
    ///
    /// # Errors
    /// The kernel's answer: it may lack nf_tables or its nat.
    pub fn new(ports: [Option<u16>; 2]) -> io::Result<Self> {
        let mut socket = Socket::new(NETLINK_NETFILTER)?;
        socket.bind_auto()?;
        socket.connect(&SocketAddr::new(0, 0))?;
        let rules = FAMILIES.iter().zip(ports).filter_map(|(family, port)| Some(rule(*family, port?)));
        let mut batch = Vec::new();
        let mut expected = 0;
        push(&mut batch, NetfilterProtoFamily::Unspec, SUBSYSTEM, ControlMessage::BatchBegin, NLM_F_REQUEST);
        for message in [table(), chain()].into_iter().chain(rules) {
            let flags = NLM_F_REQUEST | NLM_F_ACK | NLM_F_CREATE | NLM_F_APPEND;
            push(&mut batch, NetfilterProtoFamily::Inet, 0, message, flags);
            expected += 1;
        }
        push(&mut batch, NetfilterProtoFamily::Unspec, SUBSYSTEM, ControlMessage::BatchEnd, NLM_F_REQUEST);
        socket.send(&batch, 0)?;
        // One answer each, whether or not the batch was carried out.
        while expected > 0 {
            expected -= answers(&socket.recv_from_full()?.0)?;
        }
        Ok(Self(socket))
    }
}

/// Counts the answers that say yes.
fn answers(mut bytes: &[u8]) -> io::Result<usize> {
    let invalid = |e| io::Error::new(io::ErrorKind::InvalidData, e);
    let mut count = 0;
    while !bytes.is_empty() {
        let length = NetlinkBuffer::new_checked(bytes).map_err(invalid)?.length() as usize;
        let message = NetlinkMessage::<NetfilterMessage>::parse(&NetlinkBuffer::new(&bytes)).map_err(invalid)?;
        if let NetlinkPayload::Error(error) = message.payload {
            if error.code.is_some() {
                return Err(error.to_io());
            }
            count += 1;
        }
        // Messages are aligned to four bytes.
        bytes = bytes.get(length.next_multiple_of(4).max(4)..).unwrap_or_default();
    }
    Ok(count)
}

fn push(
    batch: &mut Vec<u8>,
    family: NetfilterProtoFamily,
    resource: u16,
    message: impl Into<NetfilterMessageInner>,
    flags: u16,
) {
    let mut message = NetlinkMessage::from(NetfilterMessage::new(NetfilterHeader::new(family, 0, resource), message));
    message.header.flags = flags;
    message.header.sequence_number = 1;
    message.finalize();
    let start = batch.len();
    batch.resize(start + message.buffer_len().next_multiple_of(4), 0);
    message.serialize(&mut batch[start..]);
}

fn table() -> NfTablesMessage {
    let attributes = vec![TableAttribute::Name(TABLE.into()), TableAttribute::Flags(TableFlags::Owner)];
    NfTablesMessage::NewTable(TableMessage { attributes })
}

fn chain() -> NfTablesMessage {
    let attributes = vec![
        ChainAttribute::Table(TABLE.into()),
        ChainAttribute::Name(CHAIN.into()),
        ChainAttribute::Type("nat".into()),
        ChainAttribute::Hook(vec![
            Hook::Number(InetHookNumber::LocalOut.into()),
            Hook::Priority(PRIORITY.cast_unsigned()),
        ]),
    ];
    NfTablesMessage::NewChain(ChainMessage { attributes })
}

fn rule(family: u8, port: u16) -> NfTablesMessage {
    let mut expressions = Vec::new();
    let mut demand = |key, value: &[u8]| {
        expressions.push(Expressions::Meta(vec![Meta::Key(key), Meta::DestinationRegister(Register::Reg1)]));
        expressions.push(Expressions::Cmp(vec![
            Cmp::SourceRegister(Register::Reg1),
            Cmp::Op(Operator::Equal),
            Cmp::Data(DataAttribute::Value(value.to_vec())),
        ]));
    };
    demand(MetaKey::Oif, &LOOPBACK.to_ne_bytes());
    demand(MetaKey::L4Proto, &[TCP]);
    demand(MetaKey::Nfproto, &[family]);
    expressions.push(Expressions::Immediate(vec![
        Immediate::DestinationRegister(Register::Reg1),
        Immediate::Data(DataAttribute::Value(port.to_be_bytes().to_vec())),
    ]));
    let register = DefaultNla::new(REDIR_PORT, u32::from(Register::Reg1).to_be_bytes().to_vec());
    expressions.push(Expressions::Other { expression_type: "redir".into(), attributes: vec![register] });
    let expressions = expressions.into_iter().map(ListAttribute::<ExpressionAttribute>::from).collect();
    let attributes = vec![
        RuleAttribute::Table(TABLE.into()),
        RuleAttribute::Chain(CHAIN.into()),
        RuleAttribute::Expressions(expressions),
    ];
    NfTablesMessage::NewRule(RuleMessage { attributes })
}
