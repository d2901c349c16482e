use mesh_tests::{Fleet, fleet_test};

#[test]
fn three_nodes_reach_each_other_over_both_families() {
    fleet_test("mesh::three_nodes_reach_each_other_over_both_families", || {
        let fleet = Fleet::with_nodes(&["alpha", "bravo", "charlie"]);
        let listed = fleet.controller(&["node", "ls", "-o", "json"]).ok().json();
        let names: Vec<_> =
            listed["items"].as_array().unwrap().iter().map(|node| node["name"].as_str().unwrap()).collect();
        assert_eq!(names, ["alpha", "bravo", "charlie"]);
    });
}
