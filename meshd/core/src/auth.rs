//! Who may give which command: one table.
//!
//! Identity is checked first ([`World::authenticate`](crate::World::authenticate)); whether a node or token
//! acts only for itself is checked with the command.

use crate::command::{Actor, CommandKind, Role};

/// A kind of caller.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Caller {
    LocalRoot,
    Controller,
    Node,
    Token,
    Operator(Role),
}

impl Caller {
    /// Every kind.
    pub const ALL: [Caller; 8] = [
        Caller::LocalRoot,
        Caller::Controller,
        Caller::Node,
        Caller::Token,
        Caller::Operator(Role::Admin),
        Caller::Operator(Role::Operator),
        Caller::Operator(Role::Enroller),
        Caller::Operator(Role::Auditor),
    ];

    /// The kind of `actor`; an operator's role comes from World, never from the caller.
    pub fn of(actor: &Actor, role: Option<Role>) -> Option<Self> {
        match actor {
            Actor::LocalRoot => Some(Caller::LocalRoot),
            Actor::Controller => Some(Caller::Controller),
            Actor::Node { .. } => Some(Caller::Node),
            Actor::Token { .. } => Some(Caller::Token),
            Actor::Operator { .. } => role.map(Caller::Operator),
        }
    }

    /// Whether this kind of caller may give this kind of command. Local root is an admin.
    pub fn may(self, kind: CommandKind) -> bool {
        use CommandKind as K;
        match kind {
            K::CreateMesh => matches!(self, Caller::LocalRoot | Caller::Controller),
            K::CertifyController
            | K::CertifyResponder
            | K::RecordCrl
            | K::OpenCrlShards
            | K::RecordDenials
            | K::HoldClock
            | K::AcknowledgeBundle => self == Caller::Controller,
            K::RequestEnrollment | K::Enroll | K::LoginOperator => self == Caller::Token,
            K::RenewIdentity | K::ResumeIdentity | K::LeaveNode => self == Caller::Node,
            K::CreateToken | K::RevokeToken | K::ApproveNode => self.rank() >= ENROLLER,
            K::TagNode | K::RevokeNode | K::RemoveNode | K::RotateKeys | K::ApplyPolicy => {
                self.rank() >= OPERATOR
            }
            K::IssueCertificate | K::RevokeCertificates => self.rank() >= OPERATOR || self == Caller::Node,
            K::AddOperator
            | K::RemoveOperator
            | K::ConfirmClock
            | K::StartRotation
            | K::AbortRotation
            | K::ExportRoot
            | K::SealRoot => self.rank() >= ADMIN,
            // The controller itself only where the admin who started it said so.
            K::AdvanceRotation => self.rank() >= ADMIN || self == Caller::Controller,
        }
    }

    fn rank(self) -> u8 {
        match self {
            Caller::LocalRoot | Caller::Operator(Role::Admin) => ADMIN,
            Caller::Operator(Role::Operator) => OPERATOR,
            Caller::Operator(Role::Enroller) => ENROLLER,
            Caller::Operator(Role::Auditor) | Caller::Controller | Caller::Node | Caller::Token => NOBODY,
        }
    }
}

const NOBODY: u8 = 0;
const ENROLLER: u8 = 1;
const OPERATOR: u8 = 2;
const ADMIN: u8 = 3;

#[cfg(test)]
mod tests {
    use super::*;

    /// The whole table, written out, so that a change of one cell is seen.
    #[test]
    fn the_table_is_as_decided() {
        // local root, controller, node, token, admin, operator, enroller, auditor
        let table = [
            (CommandKind::CreateMesh, "xx......"),
            (CommandKind::CertifyController, ".x......"),
            (CommandKind::CertifyResponder, ".x......"),
            (CommandKind::CreateToken, "x...xxx."),
            (CommandKind::RevokeToken, "x...xxx."),
            (CommandKind::RequestEnrollment, "...x...."),
            (CommandKind::Enroll, "...x...."),
            (CommandKind::ApproveNode, "x...xxx."),
            (CommandKind::TagNode, "x...xx.."),
            (CommandKind::RevokeNode, "x...xx.."),
            (CommandKind::RemoveNode, "x...xx.."),
            (CommandKind::LeaveNode, "..x....."),
            (CommandKind::RenewIdentity, "..x....."),
            (CommandKind::ResumeIdentity, "..x....."),
            (CommandKind::RotateKeys, "x...xx.."),
            (CommandKind::IssueCertificate, "x.x.xx.."),
            (CommandKind::RevokeCertificates, "x.x.xx.."),
            (CommandKind::ApplyPolicy, "x...xx.."),
            (CommandKind::AddOperator, "x...x..."),
            (CommandKind::RemoveOperator, "x...x..."),
            (CommandKind::LoginOperator, "...x...."),
            (CommandKind::RecordCrl, ".x......"),
            (CommandKind::OpenCrlShards, ".x......"),
            (CommandKind::StartRotation, "x...x..."),
            (CommandKind::AdvanceRotation, "xx..x..."),
            (CommandKind::AbortRotation, "x...x..."),
            (CommandKind::AcknowledgeBundle, ".x......"),
            (CommandKind::ExportRoot, "x...x..."),
            (CommandKind::SealRoot, "x...x..."),
            (CommandKind::RecordDenials, ".x......"),
            (CommandKind::HoldClock, ".x......"),
            (CommandKind::ConfirmClock, "x...x..."),
        ];
        assert_eq!(table.map(|(kind, _)| kind), CommandKind::ALL);
        for (kind, row) in table {
            let real: String =
                Caller::ALL.iter().map(|caller| if caller.may(kind) { 'x' } else { '.' }).collect();
            assert_eq!(real, row, "{kind}");
        }
    }
}
