//! Guessing tokens: nothing is learned, tries run out, others are not held up.

use mesh_ca::LeafKey;
use mesh_proto::v1 as pb;
use mesh_tests::{Fleet, fleet_test};
use tonic::{Code, Status};

use crate::{
    credential::client_config,
    join::{open, request},
    rpc::{channel, controller, error_code, on_host},
};

/// Wrong secrets that one source may try within a minute, as documented.
const TRIES: usize = 20;

/// All that a caller can see of a refusal but its time.
fn visible(status: &Status) -> (Code, String, Vec<u8>, Vec<String>) {
    let mut headers: Vec<_> = status.metadata().keys().map(|key| format!("{key:?}")).collect();
    headers.retain(|header| !header.contains("date"));
    (status.code(), status.message().to_owned(), status.details().to_vec(), headers)
}

#[test]
fn a_guesser_learns_nothing_and_runs_out_of_tries() {
    fleet_test("tokens::a_guesser_learns_nothing_and_runs_out_of_tries", || {
        let mut fleet = Fleet::new();
        for host in ["guesser", "honest"] {
            fleet.add_host(host);
        }
        let (real, used, revoked) =
            (open(&fleet.token(&[])), open(&fleet.token(&[])), open(&fleet.token(&[])));
        fleet.controller(&["token", "revoke", &hex::encode(&revoked.id)]).ok();
        let operator =
            open(fleet.controller(&["operator", "add", "al", "--role", "admin"]).ok().stdout.trim());

        let key = LeafKey::generate().unwrap();
        let ask = |fleet: &Fleet, from: &str, requests: Vec<pb::EnrollRequest>| -> Vec<Result<(), Status>> {
            let (address, config) = (controller(fleet), client_config(fleet, None));
            on_host(fleet, from, || async move {
                let channel = channel(address, config).await.unwrap();
                let mut client = pb::enrollment_client::EnrollmentClient::new(channel);
                let mut answers = Vec::new();
                for request in requests {
                    answers.push(client.enroll(request).await.map(drop));
                }
                answers
            })
        };
        let wrong = |token: &pb::JoinToken, change: &dyn Fn(&mut pb::EnrollRequest)| {
            let mut request = request(token, "web-1", &key);
            change(&mut request);
            request
        };
        ask(&fleet, "honest", vec![request(&used, "first", &key)]).remove(0).unwrap();

        let flip = |request: &mut pb::EnrollRequest, at: usize| {
            let mut secret = request.token_secret.to_vec();
            secret[at] ^= 1;
            request.token_secret = secret.into();
        };
        let mut guesses = vec![
            wrong(&real, &|r| r.token_id = vec![0x5a; 8].into()),
            wrong(&real, &|r| r.token_id = vec![].into()),
            wrong(&real, &|r| r.token_id = vec![0x5a; 64].into()),
            wrong(&real, &|r| r.token_secret = vec![].into()),
            wrong(&real, &|r| r.token_secret = vec![0; 4096].into()),
            wrong(&real, &|r| flip(r, 0)),
            wrong(&real, &|r| flip(r, 31)),
            wrong(&used, &|r| flip(r, 31)),
            wrong(&revoked, &|r| flip(r, 31)),
            wrong(&operator, &|r| flip(r, 31)),
            wrong(&real, &|r| r.token_secret = used.secret.clone()),
            // What else is wrong must not be said either.
            wrong(&real, &|r| {
                flip(r, 5);
                r.csr = vec![1, 2, 3].into();
            }),
            wrong(&real, &|r| {
                flip(r, 5);
                r.name = "first".into();
            }),
        ];
        while guesses.len() < TRIES {
            guesses.push(wrong(&real, &|r| flip(r, 7)));
        }
        let refusals: Vec<Status> =
            ask(&fleet, "guesser", guesses).into_iter().map(|answer| answer.unwrap_err()).collect();
        assert_eq!(error_code(&refusals[0]), pb::ErrorCode::TokenInvalid, "{:?}", refusals[0]);
        for (number, refusal) in refusals.iter().enumerate() {
            assert_eq!(visible(refusal), visible(&refusals[0]), "guess {number}");
        }

        // From here on even the right token is not looked at, and it is not spent either.
        let held = ask(&fleet, "guesser", vec![request(&real, "web-1", &key); 2]);
        for answer in held {
            assert_eq!(error_code(&answer.unwrap_err()), pb::ErrorCode::Overloaded);
        }
        let fresh = LeafKey::generate().unwrap();
        let honest = request(&real, "web-1", &fresh);
        ask(&fleet, "honest", vec![honest]).remove(0).expect("an honest enrollment is not held up");
    });
}
