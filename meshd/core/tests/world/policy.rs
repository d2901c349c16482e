//! The policy against a naive evaluator, and against the names of the mesh.

use std::collections::BTreeSet;

use mesh_core::policy::{Selector, Subject};
use mesh_core::{Actor, Command, NodeName, Policy, Refusal, Tag};
use proptest::collection::{btree_set, vec};
use proptest::prelude::*;

use crate::fixture::*;

fn grant(name: &str) -> String {
    format!("[[grant]]\nnames = [\"{name}\"]\nto = [\"tag:web\"]")
}

#[test]
fn a_name_has_one_owner_whichever_comes_first() {
    let mut mesh = Fixture::new();
    mesh.enroll("alpha", &[]);
    let bravo = mesh.enroll("bravo", &[]);
    mesh.ok(Actor::LocalRoot, revoke_node(&bravo));
    let bad = [
        ("alpha.mesh.internal", "belongs to node alpha"),
        ("api.alpha.mesh.internal", "belongs to node alpha"),
        ("bravo.mesh.internal", "belongs to node bravo"),
        ("acme.mesh.internal", "is reserved"),
        ("x.ctl-1.mesh.internal", "is reserved"),
        ("mesh.internal", "is the domain itself"),
        ("api.example.com", "is outside mesh.internal"),
    ];
    for (name, why) in bad {
        let refusal = mesh.refused(Actor::LocalRoot, Command::ApplyPolicy { toml: grant(name) });
        let problems = vec![format!("grant[0]: {name} {why}")];
        assert_eq!(refusal, Refusal::PolicyInvalid { problems });
    }
    let version = mesh.world.policy_version();
    let toml = grant("api.mesh.internal");
    mesh.ok(Actor::LocalRoot, Command::ApplyPolicy { toml: toml.clone() });
    mesh.already_done(Actor::LocalRoot, Command::ApplyPolicy { toml });
    assert_eq!(mesh.world.policy_version(), version + 1);
    let token = mesh.token(None, &[], 1, false);
    let command = mesh.enrollment(token, "api");
    assert!(matches!(mesh.refused(anonymous(token), command), Refusal::NameTaken { .. }));
}

#[test]
fn selectors_without_effect_are_warned_about() {
    let mut mesh = Fixture::new();
    mesh.enroll("alpha", &["web"]);
    let policy = Policy::parse(
        "[[allow]]\nfrom = [\"tag:web\", \"tag:db\", \"*\"]\nto = [\"node:alpha\", \"node:bravo\", \"tag:db\"]",
    );
    let warnings = mesh.world.policy_warnings(&policy.unwrap());
    assert_eq!(warnings, ["tag:db matches no node", "node:bravo matches no node"]);
}

/// Rules and subjects over few tags and names, so that they often meet.
#[derive(Clone, Debug)]
struct Case {
    rules: Vec<(Vec<Selector>, Vec<Selector>)>,
    nodes: Vec<(NodeName, BTreeSet<Tag>)>,
}

fn any_tag() -> impl Strategy<Value = Tag> {
    (0..4).prop_map(|n| Tag::try_from(format!("t{n}")).unwrap())
}

fn any_name() -> impl Strategy<Value = NodeName> {
    (0..4).prop_map(|n| NodeName::try_from(format!("n{n}")).unwrap())
}

fn any_selector() -> impl Strategy<Value = Selector> {
    prop_oneof![
        1 => Just(Selector::Any),
        4 => any_tag().prop_map(Selector::Tag),
        3 => any_name().prop_map(Selector::Node),
    ]
}

fn any_case() -> impl Strategy<Value = Case> {
    let side = || vec(any_selector(), 1..3);
    let nodes = vec((any_name(), btree_set(any_tag(), 0..3)), 2..5);
    (vec((side(), side()), 0..5), nodes).prop_map(|(rules, nodes)| Case { rules, nodes })
}

/// The policy as somebody would type it.
fn to_toml(case: &Case) -> String {
    let list = |selectors: &[Selector]| {
        selectors.iter().map(|selector| format!("\"{selector}\"")).collect::<Vec<_>>().join(", ")
    };
    let rule = |(from, to): &(Vec<Selector>, Vec<Selector>)| {
        format!("[[allow]]\nfrom = [{}]\nto = [{}]\n", list(from), list(to))
    };
    case.rules.iter().map(rule).collect()
}

/// What the words say, without any of the product's code.
fn naive_allows(case: &Case, from: usize, to: usize) -> bool {
    let mut allowed = false;
    for (from_side, to_side) in &case.rules {
        let hits = |side: &[Selector], (name, tags): &(NodeName, BTreeSet<Tag>)| {
            let mut hit = false;
            for selector in side {
                hit |= match selector {
                    Selector::Any => true,
                    Selector::Tag(wanted) => tags.iter().any(|tag| tag.as_str() == wanted.as_str()),
                    Selector::Node(wanted) => name.as_str() == wanted.as_str(),
                };
            }
            hit
        };
        allowed |= hits(from_side, &case.nodes[from]) && hits(to_side, &case.nodes[to]);
    }
    allowed
}

proptest! {
    /// Parsed policy, the short cut for many peers, and the words agree about every pair.
    #[test]
    fn the_policy_says_what_its_words_say(case in any_case()) {
        let policy = Policy::parse(&to_toml(&case)).unwrap();
        let subject = |index: usize| Subject { name: &case.nodes[index].0, tags: &case.nodes[index].1 };
        for from in 0..case.nodes.len() {
            let about = policy.about(subject(from));
            for to in 0..case.nodes.len() {
                let naive = naive_allows(&case, from, to);
                prop_assert_eq!(policy.allows(subject(from), subject(to)), naive);
                prop_assert_eq!(about.outbound(subject(to)), naive);
                prop_assert_eq!(about.inbound(subject(to)), naive_allows(&case, to, from));
            }
        }
    }

    /// No text makes the parser panic, or answer with an empty list of problems.
    #[test]
    fn the_parser_survives_any_text(text in "\\PC*|(\\[\\[(allow|grant)\\]\\]\n|(from|to|names|x) = (\\[(\"\\PC{0,9}\",?)*\\]|7)\n){0,12}") {
        if let Err(problems) = Policy::parse(&text) {
            prop_assert!(!problems.is_empty());
            prop_assert!(problems.iter().all(|problem| !problem.contains('\n')));
        }
    }
}
