//! Who calls, and what they may call. One table; a method without a row is nobody's.

use std::net::IpAddr;

use mesh_core::{Actor, NodeId, OperatorName, Serial};
use tonic::{Extensions, Status};

use crate::status::Problem;

/// Who speaks on a connection, as World knew it when the request arrived.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Caller {
    /// No certificate was shown.
    Anonymous {
        address: Option<IpAddr>,
    },
    /// A node, by the certificate of its identity.
    Node {
        id: NodeId,
        name: String,
        serial: Serial,
    },
    /// A node whose certificate is past its end: it may ask for a new one and nothing else.
    ExpiredNode {
        id: NodeId,
        name: String,
        serial: Serial,
    },
    /// A certificate of this mesh that speaks for no node and no operator.
    Service {
        serial: Serial,
        owner: String,
    },
    Operator {
        name: OperatorName,
        serial: Serial,
    },
    /// Root or the daemon's own user, on the local socket.
    LocalRoot,
}

impl Caller {
    /// The caller that the gate has put on a request.
    pub(crate) fn from_extensions(extensions: &Extensions) -> Result<Self, Status> {
        extensions
            .get::<Self>()
            .cloned()
            .ok_or_else(|| Problem::internal("request came past the gate").into())
    }

    /// Who acts, for a command. `None` where only a checked token could act.
    pub(crate) fn actor(&self) -> Option<Actor> {
        match self {
            Self::Node { id, serial, .. } | Self::ExpiredNode { id, serial, .. } => {
                Some(Actor::Node { id: *id, serial: *serial })
            }
            Self::Operator { name, serial } => Some(Actor::Operator { name: name.clone(), serial: *serial }),
            Self::LocalRoot => Some(Actor::LocalRoot),
            Self::Anonymous { .. } | Self::Service { .. } => None,
        }
    }

    fn kind(&self) -> Kind {
        match self {
            Self::Anonymous { .. } => Kind::Anonymous,
            Self::Node { .. } => Kind::Node,
            Self::ExpiredNode { .. } => Kind::ExpiredNode,
            Self::Service { .. } => Kind::Service,
            Self::Operator { .. } => Kind::Operator,
            Self::LocalRoot => Kind::LocalRoot,
        }
    }

    /// For logs and refusals.
    pub(crate) fn describe(&self) -> String {
        match self {
            Self::Anonymous { .. } => "a caller without a certificate".into(),
            Self::Node { name, .. } => format!("node {name}"),
            Self::ExpiredNode { name, .. } => format!("node {name}, whose certificate has expired"),
            Self::Service { owner, .. } => format!("the certificate of {owner}"),
            Self::Operator { name, .. } => format!("operator {name}"),
            Self::LocalRoot => "local root".into(),
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Anonymous,
    Node,
    ExpiredNode,
    Service,
    Operator,
    LocalRoot,
}

use Kind::{Anonymous, ExpiredNode, LocalRoot, Node, Operator, Service};

/// Callers that run the fleet. What each operator's role allows is decided with the command.
const OPERATORS: &[Kind] = &[Operator, LocalRoot];
/// What only the controller's own host may have.
const ROOT: &[Kind] = &[LocalRoot];
const NODES: &[Kind] = &[Node];
const NODES_AND_OPERATORS: &[Kind] = &[Node, Operator, LocalRoot];
const MEMBERS: &[Kind] = &[Node, Service, Operator, LocalRoot];
/// A token in the message is the authority, whoever else the caller may be.
const TOKEN_HOLDERS: &[Kind] = &[Anonymous];
const RESUMING: &[Kind] = &[Node, ExpiredNode];

/// Every method of every service that the controller serves, and who may call it.
pub(crate) const TABLE: &[(&str, &[Kind])] = &[
    ("/mesh.v1.Enrollment/Enroll", TOKEN_HOLDERS),
    ("/mesh.v1.Renewal/Renew", NODES),
    ("/mesh.v1.Renewal/Resume", RESUMING),
    ("/mesh.v1.Sync/Sync", NODES),
    ("/mesh.v1.Relay/Open", NODES),
    ("/mesh.v1.Certificates/Issue", NODES_AND_OPERATORS),
    ("/mesh.v1.Certificates/Explain", NODES_AND_OPERATORS),
    ("/mesh.v1.Certificates/List", NODES_AND_OPERATORS),
    ("/mesh.v1.Certificates/Get", NODES_AND_OPERATORS),
    ("/mesh.v1.Certificates/Revoke", NODES_AND_OPERATORS),
    ("/mesh.v1.Certificates/Crls", MEMBERS),
    ("/mesh.v1.Tokens/Create", OPERATORS),
    ("/mesh.v1.Tokens/List", OPERATORS),
    ("/mesh.v1.Tokens/Revoke", OPERATORS),
    ("/mesh.v1.Nodes/List", OPERATORS),
    ("/mesh.v1.Nodes/Get", OPERATORS),
    ("/mesh.v1.Nodes/Approve", OPERATORS),
    ("/mesh.v1.Nodes/Tag", OPERATORS),
    ("/mesh.v1.Nodes/Revoke", OPERATORS),
    ("/mesh.v1.Nodes/Remove", OPERATORS),
    ("/mesh.v1.Nodes/RotateKeys", OPERATORS),
    ("/mesh.v1.Nodes/Leave", NODES),
    ("/mesh.v1.Policy/Get", OPERATORS),
    ("/mesh.v1.Policy/Check", OPERATORS),
    ("/mesh.v1.Policy/Apply", OPERATORS),
    ("/mesh.v1.Operators/Add", OPERATORS),
    ("/mesh.v1.Operators/List", OPERATORS),
    ("/mesh.v1.Operators/Remove", OPERATORS),
    ("/mesh.v1.Operators/Login", TOKEN_HOLDERS),
    ("/mesh.v1.Audit/Log", OPERATORS),
    ("/mesh.v1.Audit/Verify", OPERATORS),
    ("/mesh.v1.Ca/Show", OPERATORS),
    ("/mesh.v1.Ca/RotationStatus", OPERATORS),
    ("/mesh.v1.Ca/StartRotation", OPERATORS),
    ("/mesh.v1.Ca/AdvanceRotation", OPERATORS),
    ("/mesh.v1.Ca/AbortRotation", OPERATORS),
    ("/mesh.v1.Ca/ExportRoot", OPERATORS),
    ("/mesh.v1.Ca/Seal", OPERATORS),
    ("/mesh.v1.Ca/RequestIssuer", OPERATORS),
    ("/mesh.v1.Ca/ImportCrl", OPERATORS),
    ("/mesh.v1.Ca/Backup", ROOT),
    ("/mesh.v1.Fleet/Status", OPERATORS),
    ("/mesh.v1.Fleet/ConfirmClock", OPERATORS),
];

/// Who may call `path`; `None` for a method that does not exist.
pub(crate) fn callers_of(path: &str) -> Option<&'static [Kind]> {
    TABLE.iter().find(|(row, _)| *row == path).map(|(_, kinds)| *kinds)
}

/// Whether `caller` may call `path`.
///
/// # Errors
/// A status that says who called and what for.
pub(crate) fn authorize(caller: &Caller, path: &str) -> Result<(), Status> {
    let Some(kinds) = callers_of(path) else {
        return Err(Status::unimplemented("unknown method"));
    };
    if kinds.contains(&caller.kind()) {
        return Ok(());
    }
    Err(match caller {
        Caller::ExpiredNode { .. } => Problem::identity_expired().into(),
        _ => Problem::denied(&caller.describe(), method_name(path)).into(),
    })
}

/// `/mesh.v1.Nodes/Revoke` as `Nodes/Revoke`.
pub(crate) fn method_name(path: &str) -> &str {
    path.trim_start_matches("/mesh.v1.")
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    /// The node's own socket is served by `meshd node`, not by the controller.
    const SERVED_ELSEWHERE: &[&str] = &["mesh.v1.Local"];

    fn methods_of_the_schema() -> BTreeSet<String> {
        let pool = prost_reflect::DescriptorPool::decode(mesh_proto::FILE_DESCRIPTOR_SET).unwrap();
        pool.services()
            .filter(|service| !SERVED_ELSEWHERE.contains(&service.full_name()))
            .flat_map(|service| {
                let name = service.full_name().to_owned();
                service.methods().map(move |m| format!("/{name}/{}", m.name())).collect::<Vec<_>>()
            })
            .collect()
    }

    #[test]
    fn every_method_of_the_schema_has_exactly_one_row_and_no_row_is_left_over() {
        let rows: Vec<String> = TABLE.iter().map(|(path, _)| (*path).to_owned()).collect();
        let unique: BTreeSet<String> = rows.iter().cloned().collect();
        assert_eq!(rows.len(), unique.len(), "a method has two rows");
        assert_eq!(unique, methods_of_the_schema());
        assert!(TABLE.iter().all(|(_, kinds)| !kinds.is_empty()));
    }

    #[test]
    fn only_a_node_reaches_node_methods_and_an_expired_one_only_resume() {
        let serial = Serial([0x40; 16]);
        let node = Caller::Node { id: NodeId(1), name: "web-1".into(), serial };
        let expired = Caller::ExpiredNode { id: NodeId(1), name: "web-1".into(), serial };
        let service = Caller::Service { serial, owner: "service web".into() };
        let operator = Caller::Operator { name: OperatorName::try_from("alice").unwrap(), serial };
        let stranger = Caller::Anonymous { address: None };
        for (path, _) in TABLE {
            let allowed = |caller: &Caller| authorize(caller, path).is_ok();
            let for_nodes = ["Renewal/", "Sync/", "Relay/", "Nodes/Leave"].iter().any(|p| path.contains(p));
            if for_nodes {
                assert!(allowed(&node), "{path}");
                for other in [&service, &operator, &stranger, &Caller::LocalRoot] {
                    assert!(!allowed(other), "{path} {other:?}");
                }
            }
            let for_operators =
                !for_nodes && !["/Enroll", "/Login", "/Backup"].iter().any(|p| path.ends_with(p));
            assert_eq!(allowed(&operator), for_operators, "{path}");
            assert_eq!(allowed(&expired), path.ends_with("/Resume"), "{path}");
            assert_eq!(allowed(&service), path.ends_with("/Crls"), "{path}");
            assert_eq!(allowed(&stranger), path.ends_with("/Enroll") || path.ends_with("/Login"), "{path}");
        }
    }

    #[test]
    fn an_unknown_method_is_nobodys() {
        for path in ["/mesh.v1.Local/Enroll", "/mesh.v1.Nodes/Drop", "/", ""] {
            assert!(authorize(&Caller::LocalRoot, path).is_err(), "{path}");
        }
    }
}
