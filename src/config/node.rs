//! From settings to a node: its name, slot and addresses.

use std::net::{IpAddr, SocketAddr};

use super::{Config, Error, MemberKind, TlsMode};
use crate::env::Disk;
use crate::env::net::Place;
use crate::identity::{self, NodeName, PeerAddresses, PeerList, READER_SLOT};

/// Who this node is and how others reach it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Node {
    pub name: String,
    /// [`READER_SLOT`] for a node that owns none.
    pub slot: u16,
    /// None: a cluster of one.
    pub peers: Option<PeerAddresses>,
    /// Stands for the list of first members that this node was given, and its token; 0: it was given none.
    pub founding: u64,
    /// `host:port`.
    pub advertise_peer: String,
    /// The same, for who does not find it there.
    pub more_peer_addresses: Vec<String>,
    /// URLs.
    pub advertise_client: Vec<String>,
}

impl Config {
    /// [`Config::node`] with this process's `POD_NAME` and this machine's host name.
    pub fn node_here(&self, disk: &dyn Disk) -> Result<Node, Error> {
        let mut node = self.node(std::env::var("POD_NAME").ok().as_deref(), &identity::host_name(disk))?;
        if let (MemberKind::Manual | MemberKind::Reader, [], Ok(ip)) =
            (self.cluster.kind, &self.server.advertise_peer[..], std::env::var("POD_IP"))
            && let Ok(ip) = ip.parse::<IpAddr>()
        {
            node.advertise_peer = SocketAddr::new(ip, self.listen_peer().port()).to_string();
            if self.server.advertise_client.is_empty() {
                node.advertise_client = vec![self.derived_client_url(&node.advertise_peer, true)];
            }
        }
        Ok(node)
    }

    /// Decides the node's identity (membership rules 1-3).
    ///
    /// Without a peer pattern the name need hold no slot: a cluster of one runs anywhere. A slot that was read from the name
    /// must give the name back through the pattern; with an explicit slot the two may differ. A node that is in a list of first members
    /// has its place there for a slot, by its name or by an explicit slot. Any other of another kind than `slot` has none, and tells its own address. Listen ports of 0 are advertised as they are: put the bound addresses into
    /// `server.listen_*` first.
    pub fn node(&self, pod_name: Option<&str>, host_name: &str) -> Result<Node, Error> {
        let name = NodeName::choose(&self.identity.name, pod_name, host_name)?;
        let peers = match (self.cluster.peers.as_str(), self.cluster.members.as_slice()) {
            ("", []) => None,
            ("", list) => Some(PeerAddresses::List(PeerList::new(list)?)),
            (text, _) => Some(PeerAddresses::Pattern(text.parse()?)),
        };
        let owns_slot = self.cluster.kind == MemberKind::Slot;
        let slot = match (self.identity.slot, &peers) {
            (None, Some(PeerAddresses::List(list))) => list.slot(&name.text)?,
            (Some(slot), Some(PeerAddresses::List(_))) => slot,
            _ if !owns_slot => READER_SLOT,
            (Some(slot), _) => slot,
            (None, None) => self.cluster.first_slot,
            (None, Some(PeerAddresses::Pattern(pattern))) => {
                let slot = name.ordinal()?;
                pattern.check_own(slot, &name.text)?;
                slot
            }
        };
        let own_entry = match &peers {
            Some(PeerAddresses::Pattern(pattern)) if owns_slot => {
                pattern.check(slot)?;
                Some(pattern.expand(slot))
            }
            Some(list @ PeerAddresses::List(_)) => list.expand(slot),
            _ => None,
        };
        let founding = match &peers {
            Some(PeerAddresses::List(list)) => list.fingerprint(&self.cluster.token),
            _ => 0,
        };
        let has_entry = own_entry.is_some();
        let (advertise_peer, more_peer_addresses) = match (self.server.advertise_peer.as_slice(), own_entry) {
            ([], Some(address)) => (address, Vec::new()),
            ([], None) => (reachable(self.listen_peer()).to_string(), Vec::new()),
            ([first, more @ ..], _) => (first.clone(), more.to_vec()),
        };
        let advertise_client = match self.server.advertise_client.as_slice() {
            [] => vec![self.derived_client_url(&advertise_peer, has_entry)],
            urls => urls.to_vec(),
        };
        Ok(Node { name: name.text, slot, peers, founding, advertise_peer, more_peer_addresses, advertise_client })
    }

    /// The client URL that follows from the peer address, or, where that follows from nothing, from the listen address.
    fn derived_client_url(&self, advertise_peer: &str, has_entry: bool) -> String {
        let listen = match self.server.listen_client.first_address() {
            Some(listen) => listen,
            None => return self.server.listen_client.places().first().map(|p| self.url(p)).unwrap_or_default(),
        };
        match identity::host_port(advertise_peer) {
            Some((host, _)) if has_entry || !self.server.advertise_peer.is_empty() => {
                format!("{}://{host}:{}", self.client_scheme(), listen.port())
            }
            _ => self.url(&Place::Tcp(reachable(listen))),
        }
    }

    /// A place as clients are told of it.
    fn url(&self, place: &Place) -> String {
        match place {
            Place::Tcp(address) => format!("{}://{address}", self.client_scheme()),
            Place::Unix(path) => format!("unix://{}", path.display()),
        }
    }

    fn client_scheme(&self) -> &'static str {
        if self.client_tls.mode == TlsMode::Off { "http" } else { "https" }
    }

    /// Where members connect; a configuration without such an address is not valid.
    fn listen_peer(&self) -> SocketAddr {
        self.server.listen_peer.first_address().expect("checked in `validate`")
    }
}

/// "All interfaces" is no address to dial: the loopback one stands in.
fn reachable(listen: SocketAddr) -> SocketAddr {
    match listen.ip() {
        ip if !ip.is_unspecified() => listen,
        _ => SocketAddr::new(IpAddr::from([127, 0, 0, 1]), listen.port()),
    }
}
