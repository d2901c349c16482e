//! `meshd controller init`: a state directory with a CA, a journal and its first record.

use mesh_ca::{CaKeyType, TrustDomain};
use mesh_core::policy::STARTER_POLICY;
use mesh_core::{Actor, Command, Decision, DnsName, OperationId, Request, UtcTime, World};
use mesh_runtime::SharedClock;
use mesh_store::{Append, Journal};
use sha2::{Digest as _, Sha256};

use crate::authority::{Making, label};
use crate::codec::encode_record;
use crate::config::{ImportKind, InitConfig, InitSummary, Unlock};
use crate::error::StartupError;
use crate::hardware::Hsm;
use crate::import::{self, Foreign};
use crate::publish::crl_file;
use crate::state::{Settings, StateDir};

/// Makes a new controller in `config.state_dir`. Nothing is listening afterwards.
///
/// # Errors
/// [`StartupError::StateExists`] without touching anything; after any other failure the directory that
/// was made is removed again.
pub fn init(config: InitConfig, clock: SharedClock) -> Result<InitSummary, StartupError> {
    let domain = check(&config)?;
    // Both before anything is made.
    let foreign = config.import.as_ref().map(|import| import::read(import, clock.utc_now())).transpose()?;
    let token = config.key_store.as_ref().map(|place| Hsm::new(place, config.pin.as_ref())).transpose()?;
    let (state, store) = StateDir::create(&config.state_dir)?;
    let made = fill(&config, (&domain, foreign.as_ref(), token.as_ref()), &state, store, &clock);
    if made.is_err() {
        // It is ours and of no use: a half-made one would only be in the way of the next try.
        let _ = std::fs::remove_dir_all(&config.state_dir);
    }
    made
}

fn fill(
    config: &InitConfig,
    (domain, foreign, token): (&TrustDomain, Option<&Foreign>, Option<&Hsm>),
    state: &StateDir,
    mut store: mesh_store::Store,
    clock: &SharedClock,
) -> Result<InitSummary, StartupError> {
    let now = clock.utc_now();
    let passphrase = config.passphrase.as_ref().filter(|_| config.unlock != Unlock::None);
    let made = Making {
        keys: &state.keys(),
        domain,
        fleet: &config.fleet,
        passphrase,
        token,
        foreign,
        key_type: config.key_type.unwrap_or_default(),
        now,
    }
    .create()?;
    let command = Command::CreateMesh {
        mesh_id: mesh_runtime::random_bytes(),
        journal_id: mesh_runtime::random_bytes(),
        fleet: config.fleet.clone(),
        domain: DnsName::try_from(domain.as_str()).map_err(|error| config_error("domain", error))?,
        controller_name: config.name.clone(),
        ipv4_pool: config.ipv4_pool,
        cas: made.cas.clone(),
        starter_policy: STARTER_POLICY.to_owned(),
    };
    let mut world = World::new();
    record(&mut store, state, &mut world, (Actor::LocalRoot, command), now.into())?;
    // The root signs elsewhere; its CRL is published as it came.
    let below = foreign.filter(|foreign| !foreign.ca.is_root());
    if let Some(crl) = below.and_then(|foreign| foreign.crl.as_ref()) {
        let root = &made.cas[0].key_id;
        state.write(&format!("crl/{}", crl_file(root, 0)), &crl.der)?;
        let command = Command::RecordCrl {
            issuer_key_id: root.clone(),
            shard: 0,
            number: crl.crl.number(),
            covers_seq: 0,
            digest: Sha256::digest(&crl.der).into(),
            this_update: crl.crl.this_update().into(),
            next_update: crl.crl.next_update().into(),
        };
        record(&mut store, state, &mut world, (Actor::Controller, command), now.into())?;
    }
    state.write_settings(&Settings {
        name: config.name.clone(),
        unlock: config.unlock,
        advertise: config.advertise.clone(),
        publish_url: config.publish_url.clone(),
        key_store: config.key_store.as_ref().map(|place| place.uri().to_owned()),
        // What the CA signed before it came here may be about.
        crl_number_floor: foreign.map(|foreign| {
            let last =
                foreign.crl.as_ref().filter(|_| foreign.ca.is_root()).map_or(0, |crl| crl.crl.number());
            crl_number_floor(now).max(last.saturating_add(1))
        }),
        incarnation: 1,
    })?;
    Ok(InitSummary {
        state_dir: config.state_dir.clone(),
        domain: domain.to_string(),
        root_spki_sha256: made.root_spki_sha256,
        root_not_after: made.root_not_after,
        issuing_not_after: made.issuing_not_after,
        unlock: config.unlock,
    })
}

/// Milliseconds since 1970: above the numbers of all CRLs that were ever signed, as nobody signs one each millisecond.
pub(crate) fn crl_number_floor(now: time::UtcDateTime) -> u64 {
    u64::try_from(now.unix_timestamp_nanos() / 1_000_000).unwrap_or(0)
}

fn record(
    store: &mut mesh_store::Store,
    state: &StateDir,
    world: &mut World,
    (actor, command): (Actor, Command),
    at: UtcTime,
) -> Result<(), StartupError> {
    let operation = OperationId(mesh_runtime::random_bytes());
    let request = Request { actor, operation, command };
    let decided = world.decide(at, &request).map_err(|error| config_error("mesh", error))?;
    let Decision::Changes(changes) = decided else {
        return Err(config_error("mesh", "there is one already"));
    };
    let record = world.record(at, &request, changes);
    let encoded = encode_record(&record)
        .map_err(|error| StartupError::internal("cannot encode the first record", error))?;
    let head = store.journal.head();
    match store.journal.append(&head, &[encoded]) {
        Ok(Append::Appended { head }) => {
            world.apply(head.seq, &record);
            Ok(())
        }
        Ok(Append::Conflict { .. }) => Err(StartupError::StateExists { path: state.root().into() }),
        Ok(Append::Unknown { source }) => Err(StartupError::io("sync", state.root(), source)),
        Err(mesh_store::AppendError::Full { .. }) => {
            Err(StartupError::DiskFull { path: state.root().into() })
        }
        Err(error) => Err(StartupError::internal("cannot write the first record", error)),
    }
}

fn check(config: &InitConfig) -> Result<TrustDomain, StartupError> {
    let domain = TrustDomain::parse(&config.domain).map_err(|error| config_error("domain", error))?;
    label(&config.name).map_err(|error| config_error("name", error))?;
    config.advertise.iter().try_for_each(|address| check_advertised(address))?;
    config.publish_url.iter().try_for_each(|url| check_publish_url(url))?;
    if let (Some(import), Some(_)) = (&config.import, &config.key_store)
        && import.kind == ImportKind::Issuer
    {
        return Err(config_error(
            "key_store",
            "an imported issuing CA brings its key in a file; only keys that are drawn now can be kept in a token",
        ));
    }
    if let (Some(import), Some(_)) = (&config.import, config.key_type)
        && import.kind == ImportKind::Issuer
    {
        return Err(config_error(
            "key_type",
            "an imported issuing CA brings its key; no other is drawn now, and `meshctl ca rotate start` takes the type then",
        ));
    }
    if config.key_store.is_some() && config.key_type == Some(CaKeyType::Ed25519) {
        return Err(config_error("key_type", "keys in a hardware token are p256 or p384"));
    }
    match (&config.unlock, &config.passphrase) {
        (Unlock::None, _) | (_, Some(_)) => Ok(domain),
        (_, None) => Err(StartupError::PassphraseMissing),
    }
}

/// `host:port`, where the host may be an IPv6 address in brackets.
pub(crate) fn check_advertised(address: &str) -> Result<(), StartupError> {
    let problem = |what: &str| config_error("advertise", format!("{address:?} {what}"));
    let (host, port) = address.rsplit_once(':').ok_or_else(|| problem("is not HOST:PORT"))?;
    let port: u16 = port.parse().map_err(|_| problem("has no port number"))?;
    let bracketed = host.strip_prefix('[').and_then(|host| host.strip_suffix(']'));
    let is_host = match bracketed {
        Some(host) => host.parse::<std::net::Ipv6Addr>().is_ok(),
        None => {
            host.parse::<std::net::Ipv4Addr>().is_ok()
                || mesh_ca::DnsName::parse(&host.to_ascii_lowercase()).is_ok()
        }
    };
    if !is_host || port == 0 {
        return Err(problem("does not name a host and a port"));
    }
    Ok(())
}

/// `http://host[:port][/path]`: what certificates can carry for ever.
pub(crate) fn check_publish_url(url: &str) -> Result<(), StartupError> {
    match mesh_core::world::is_base_url(url) {
        true => Ok(()),
        false => Err(config_error(
            "publish_url",
            format!("{url:?} is not a plain http://HOST[:PORT][/PATH] without a final slash"),
        )),
    }
}

fn config_error(key: &'static str, problem: impl ToString) -> StartupError {
    StartupError::Config { key, problem: problem.to_string() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn advertised_addresses_have_a_host_and_a_port() {
        for good in ["ctl.example:7443", "192.0.2.1:7443", "[2001:db8::1]:7443", "localhost:1"] {
            assert!(check_advertised(good).is_ok(), "{good}");
        }
        for bad in ["ctl.example", "ctl.example:0", ":7443", "2001:db8::1:7443", "a b:1", "x:99999", "-:1"] {
            assert!(check_advertised(bad).is_err(), "{bad}");
        }
    }
}
