use std::sync::Arc;

use mesh_core::{NodeName, WgKey};
use mesh_proto::v1 as pb;
use mesh_proto::v1::ErrorCode;
use tonic::{Request, Response, Status};

use crate::auth::Caller;
use crate::enroll::{Enrollment, TokenClaim, check_clock};
use crate::parts::Parts;
use crate::status::Problem;
use crate::wireguard;

#[derive(Debug)]
pub(crate) struct EnrollmentService(pub(crate) Arc<Parts>);

#[tonic::async_trait]
impl pb::enrollment_server::Enrollment for EnrollmentService {
    async fn enroll(
        &self,
        request: Request<pb::EnrollRequest>,
    ) -> Result<Response<pb::EnrollResponse>, Status> {
        let source = match Caller::from_extensions(request.extensions())? {
            Caller::Anonymous { address } => address,
            _ => None,
        };
        let request = request.into_inner();
        check_clock(request.node_time, self.0.utc())?;
        let enrollment = Enrollment::try_from(request)?; // nothing unchecked passes this line
        Ok(Response::new(self.0.enroller.enroll(source, enrollment).await?))
    }
}

impl TryFrom<pb::EnrollRequest> for Enrollment {
    type Error = Problem;

    fn try_from(request: pb::EnrollRequest) -> Result<Self, Problem> {
        Ok(Self {
            token: TokenClaim::new(&request.token_id, &request.token_secret),
            name: node_name(&request.name)?,
            csr: request.csr,
            wireguard: wireguard::parse_key(&request.wireguard_public_key)?,
            operation: super::operation(&request.operation_id)?,
        })
    }
}

/// A node's name as a caller gives it.
pub(crate) fn node_name(text: &str) -> Result<NodeName, Problem> {
    NodeName::try_from(text).map_err(|source| {
        mesh_core::Refusal::NameInvalid { name: mesh_core::change::escape(text), source }.into()
    })
}

/// One or two WireGuard keys, newest first.
pub(crate) fn wireguard_keys(keys: &[bytes::Bytes]) -> Result<Vec<WgKey>, Problem> {
    if keys.is_empty() || keys.len() > mesh_core::limits::WIREGUARD_KEYS_MAX {
        return Err(mesh_core::Refusal::WireguardKeyCount { count: keys.len() }.into());
    }
    if keys.len() == 2 && keys[0] == keys[1] {
        let next = "send one key, or two different ones during a rotation";
        return Err(Problem::new(ErrorCode::Usage, "one WireGuard key is listed twice", next));
    }
    keys.iter().map(|key| wireguard::parse_key(key)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_key_or_two_different_ones_are_taken() {
        let key = |byte: u8| bytes::Bytes::from(vec![byte; 32]);
        assert_eq!(wireguard_keys(&[key(9)]).unwrap().len(), 1);
        assert_eq!(wireguard_keys(&[key(9), key(7)]).unwrap().len(), 2);
        let twice = wireguard_keys(&[key(9), key(9)]).unwrap_err();
        assert_eq!((twice.code, twice.why.as_str()), (ErrorCode::Usage, "one WireGuard key is listed twice"));
        assert!(wireguard_keys(&[]).is_err());
        assert!(wireguard_keys(&[key(9), key(7), key(5)]).is_err());
    }
}
