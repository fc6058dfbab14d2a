package contract

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// The names are the specification of what is refused. Every refusal names the file and the line, and says what to write
// instead.
func TestRefused(t *testing.T) {
	volumes := "volumes: {data: , more: }\n"
	top := func(s string) string { return web("") + s }
	buckets := func(name string) string {
		return web("x-holdfast: {buckets: [up1]}") + "x-holdfast:\n  buckets:\n    " + name + ":\n"
	}
	for _, tc := range []struct {
		name, compose string
		want          string // of the message, behind the file's name
	}{
		{"privileged", web("privileged: true"), `line 4: service web: "privileged" cannot be had: a workload is never privileged; add single capabilities with cap_add`},
		{"privileged by an anchor", "x-a: &a\n  privileged: true\n" + web("<<: *a"), `line 2: service web: "privileged" cannot be had`},
		{"privileged by a list of merges", "x-a: &a\n  user: a\nx-b: &b\n  privileged: true\n" + web("<<: [*a, *b]"), `line 4: service web: "privileged" cannot be had`},
		{"a key that is an alias", "x-a: &image privileged\n" + web("*image : true"), `line 5: a key must be a word`},
		{"host network", web("network_mode: host"), `line 4: service web: "network_mode" cannot be had: workloads see their overlay network only; reach others by service name, the outside with x-holdfast.egress`},
		{"the network of another service", web("network_mode: service:db"), `line 4: service web: "network_mode" cannot be had`},
		{"no network", web("network_mode: none"), `line 4: service web: "network_mode" cannot be had: a workload reaches its own contract only; leave it out`},
		{"host PIDs", web("pid: host"), `line 4: service web: "pid" cannot be had: a sandbox has its own processes only; leave it out`},
		{"host IPC", web("ipc: host"), `line 4: service web: "ipc" cannot be had: a sandbox has its own IPC`},
		{"host users", web("userns_mode: host"), `"userns_mode" cannot be had: a sandbox is never mapped`},
		{"devices", web("devices: [/dev/fuse]"), `line 4: service web: "devices" cannot be had: a workload sees no device of the machine; leave it out`},
		{"devices under deploy", web("deploy:\n  resources:\n    reservations:\n      devices: [{capabilities: [gpu]}]"), `line 7: service web: deploy.resources.reservations: "devices" cannot be had: a workload sees no device`},
		{"gpus", web("gpus: all"), `line 4: service web: "gpus" cannot be had: a workload sees no device`},
		{"security_opt", web("security_opt: [seccomp:unconfined]"), `"security_opt" cannot be had: every workload runs in gVisor`},
		{"sysctls", web("sysctls: {a: 1}"), `"sysctls" cannot be had: set them in the image`},
		{"a path of the machine", web("volumes:\n  - data:/d\n  - /srv:/srv") + volumes, `line 6: service web: "/srv:/srv" is a path of your machine, which no node sees: use a named volume for data, and configs or secrets for files`},
		{"a path beside the file", web("volumes: [./conf:/etc/x]"), `line 4: service web: "./conf:/etc/x" is a path of your machine`},
		{"a path above the file", web("volumes: ['../conf:/etc/x']"), `line 4: service web: "../conf:/etc/x" is a path of your machine`},
		{"a path in the user's home", web("volumes: ['~/.ssh:/ssh']"), `line 4: service web: "~/.ssh:/ssh" is a path of your machine`},
		{"a path in a variable", web("volumes: ['${NONE:-/srv}:/srv']"), `line 4: service web: "/srv:/srv" is a path of your machine`},
		{"a path of Windows", web(`volumes: ['C:\data:/srv']`), `is a path of your machine`},
		{"a bind mount in the long form", web("volumes:\n  - type: bind\n    source: /srv\n    target: /srv"), `line 5: service web: a bind mount is a path of your machine, which no node sees: use a named volume`},
		{"the Docker socket", web("volumes: ['/var/run/docker.sock:/var/run/docker.sock']"), `is a path of your machine`},
		{"a mount of another type", web("volumes: [{type: npipe, source: x, target: /x}]"), `line 4: service web: a mount of type "npipe" cannot be had`},
		{"a volume without a name", web("volumes: [/data]"), `line 4: service web: the volume at /data has no name: name it, so that its data has an owner`},
		{"a volume with one letter", web("volumes: ['x:/data']") + "volumes: {x: }\n", `line 4: service web: "x:/data": in this form the name of a volume has at least two letters`},
		{"a volume that is not declared", web("volumes: ['none:/data']"), `line 2: service "web" refers to undefined volume none`},
		{"a part of a volume", web("volumes: [{type: volume, source: data, target: /d, volume: {subpath: x}}]") + volumes, `line 4: service web: volumes: "subpath" cannot be had: mount the whole volume`},
		{"options of a volume", web("volumes: ['data:/d:z']") + volumes, `line 4: service web: "data:/d:z": the only options of a volume are ro and rw`},
		{"a volume of two services", web("volumes: ['data:/d']") + "  two:\n    image: x\n    volumes: ['data:/d']\n" + volumes, `line 4: service web: volume data is used by two already: a volume belongs to one service; give each its own`},
		{"a volume of several replicas", web("volumes: ['data:/d']\nscale: 2") + volumes, `line 2: service web: it has a volume and 2 replicas: a volume belongs to one replica`},
		{"two mounts at one path", web("volumes: ['data:/d']\ntmpfs: [/d]") + volumes, `target /d already mounted`},
		{"two files at one path", web("configs: [{source: c, target: /x}]\nsecrets: [{source: s, target: /x}]") + "configs: {c: {content: c}}\nsecrets: {s: {environment: FROM_USER}}\n", `line 2: service web: two things are mounted at /x`},
		{"a mount over /", web("tmpfs: ['/']"), `line 2: service web: path "/" is not a clean absolute path`},
		{"a mount at a relative path", web("tmpfs: [tmp]"), `line 2: service web: path "tmp" is not a clean absolute path`},
		{"a mount over /proc", web("tmpfs: [/proc/x]"), `line 2: service web: nothing can be mounted at /proc/x: /proc is the sandbox's own`},
		{"a mount over /dev", web("volumes: ['data:/dev']") + volumes, `nothing can be mounted at /dev`},
		{"a config that the node writes itself", web("configs: [{source: c, target: /etc/resolv.conf}]") + "configs: {c: {content: c}}\n", `line 2: service web: /etc/resolv.conf is written by the node`},
		{"an external volume", web("volumes: ['data:/d']") + "volumes:\n  data:\n    external: true\n", `line 7: volume data: "external" cannot be had: everything that a contract uses belongs to it`},
		{"a volume with a driver", top("volumes: {data: {driver: nfs}}\n"), `line 4: volume data: the driver "nfs" cannot be had: leave it out`},
		{"a volume with options of a driver", top("volumes: {data: {driver_opts: {type: nfs}}}\n"), `line 4: volume data: "driver_opts" cannot be had: volumes and networks are holdfast's own`},
		{"a volume of 0 bytes", web("volumes: ['data:/d']") + "volumes:\n  data:\n    x-holdfast: {size: 0}\n", `line 7: volume data: size "0": write it like 1GiB, at most 64GiB`},
		{"a volume that is too large", web("volumes: ['data:/d']") + "volumes: {data: {x-holdfast: {size: 65GiB}}}\n", `volume data: size "65GiB": write it like 1GiB, at most 64GiB`},
		{"a volume whose size is no size", web("volumes: ['data:/d']") + "volumes: {data: {x-holdfast: {size: big}}}\n", `size "big": write it like 1GiB`},
		{"an external network", top("networks: {default: {external: true}}\n"), `line 4: network default: "external" cannot be had`},
		{"a network with addresses of its own", top("networks: {default: {ipam: {config: [{subnet: 10.0.0.0/8}]}}}\n"), `line 4: network default: "ipam" cannot be had: addresses derive from the contract`},
		{"a network of the machine", top("networks: {default: {driver: macvlan}}\n"), `line 4: network default: the driver "macvlan" cannot be had`},
		{"x-holdfast of a network", top("networks: {default: {x-holdfast: {}}}\n"), `line 4: network default: "x-holdfast" is not supported; it can have driver`},
		{"two networks of one service", web("networks: [aa, bb]") + "networks: {aa: , bb: }\n", `line 4: service web is on 2 networks: a workload is on one; put the services that talk to each other on the same`},
		{"an address on a network", web("networks: {aa: {ipv6_address: 'fd00::1'}}") + "networks: {aa: }\n", `line 4: service web: networks aa: "ipv6_address" cannot be had: addresses derive from the contract and cannot be chosen`},
		{"an alias that is no name", web("networks: {aa: {aliases: ['a b']}}") + "networks: {aa: }\n", `line 2: service web: host "a b"`},

		{"several ports", web("ports:\n  - 80:80\n  - 443:443"), `line 6: 2 ports are published: ports open nothing here; say under x-holdfast.routes which host name leads to which`},
		{"a range of ports", web("ports: ['8000-8010:8000-8010']"), `line 4: service web: port "8000-8010": name one port, and where it leads under x-holdfast.routes`},
		{"a UDP port", web("ports: ['53:53/udp']"), `line 4: service web: port 53/udp cannot be had: only HTTP over TCP is reached from outside, through a gateway; leave it out`},
		{"a UDP port in the long form", web("ports:\n  - target: 53\n    protocol: udp"), `line 5: service web: port 53/udp cannot be had`},
		{"a UDP port beside routes", web("ports: ['53:53/udp']") + "x-holdfast: {routes: [{host: a.localhost, service: web, port: 80}]}\n", `line 4: service web: port 53/udp cannot be had`},
		{"a port whose service makes no host name", "name: " + strings.Repeat("c", 60) + "\n" + web("ports: [80]"), `line 5: port 80 of web opens nothing: say under x-holdfast.routes which host name leads to it`},
		{"an exposed UDP port", web("expose: [53/udp]"), `line 4: service web: expose "53/udp" is not a TCP port`},
		{"an exposed range", web("expose: ['80-90']"), `line 4: service web: expose "80-90" is not a TCP port`},

		{"an unknown key of the file", "sevices: {}\n" + web(""), `line 1: the file: "sevices" is not supported; it can have name, services, volumes`},
		{"an unknown key of a service", web("imagee: x"), `line 4: service web: "imagee" is not supported; it can have image, command`},
		{"an unknown key of deploy", web("deploy: {replica: 2}"), `line 4: service web: deploy: "replica" is not supported; it can have replicas, resources`},
		{"an unknown key of a healthcheck", web("healthcheck: {tset: x}"), `line 4: service web: healthcheck: "tset" is not supported`},
		{"an unknown key of a limit", web("deploy: {resources: {limits: {memry: 1}}}"), `line 4: service web: deploy.resources.limits: "memry" is not supported; it can have cpus, memory, pids`},
		{"an unknown key of x-holdfast", top("x-holdfast:\n  route: []\n"), `line 5: x-holdfast: "route" is not supported; it can have routes, placement`},
		{"a bucket's name with a dot", buckets("a.b"), `line 7: bucket name "a.b": only a-z, 0-9 and inner - and _ are allowed`},
		{"a bucket's name with _", buckets("a_b"), `line 7: bucket name "a_b": 3 to 63 of a-z, 0-9 and inner - are allowed`},
		{"a bucket's name of two letters", buckets("ab"), `line 7: bucket name "ab": 3 to 63 of`},
		{"buckets as a list", web("x-holdfast: {buckets: [up1]}") + "x-holdfast:\n  buckets: [up1]\n", `line 6: x-holdfast.buckets: it must be a mapping`},
		{"a bucket that is a word", web("x-holdfast: {buckets: [up1]}") + "x-holdfast:\n  buckets:\n    up1: yes\n", `line 7: bucket up1: it must be a mapping`},
		{"an unknown key of a bucket", web("x-holdfast: {buckets: [up1]}") + "x-holdfast:\n  buckets:\n    up1: {locked: true}\n", `line 7: bucket up1: "locked" is not supported; it can have versioning`},
		{"versioning that is no yes or no", web("x-holdfast: {buckets: [up1]}") + "x-holdfast:\n  buckets:\n    up1: {versioning: 3}\n", `line 7: bucket up1: versioning is true or false`},
		{"a bucket that is not declared", web("x-holdfast:\n  buckets: [up2]") + "x-holdfast:\n  buckets:\n    up1:\n", `line 5: service web: bucket "up2" is not there: name it under x-holdfast.buckets at the top of the file`},
		{"a bucket of a service and none at the top", web("x-holdfast: {buckets: [up1]}"), `line 4: service web: bucket "up1" is not there`},
		{"a service's buckets as a mapping", web("x-holdfast: {buckets: {up1: }}"), `line 4: service web: x-holdfast.buckets: it must be a list`},
		{"buckets of nobody", top("x-holdfast:\n  buckets:\n    up1:\n"), `line 6: no service has a bucket: name them under x-holdfast.buckets of those that use them`},
		{"a service with the buckets' name", web("x-holdfast: {buckets: [up1]}") + "  s3: {image: x}\nx-holdfast: {buckets: {up1: }}\n", `line 5: service s3: that is the name of the contract's buckets: give the service another`},
		{"an alias with the buckets' name", web("x-holdfast: {buckets: [up1]}\nnetworks: {aa: {aliases: [s3]}}") + "networks: {aa: }\nx-holdfast: {buckets: {up1: }}\n", `line 5: service web: the alias s3 is the name of the contract's buckets: leave it out`},
		{"buckets on two networks", web("x-holdfast: {buckets: [up1]}\nnetworks: [aa]") + "  web2:\n    image: x\n    x-holdfast: {buckets: [up1]}\n    networks: [bb]\nnetworks: {aa: , bb: }\nx-holdfast: {buckets: {up1: }}\n", `line 9: services web and web2 have buckets and are on two networks, aa and bb: put them on one`},
		{"a variable that comes with buckets", web("x-holdfast: {buckets: [up1]}\nenvironment: {AWS_REGION: x}") + "x-holdfast: {buckets: {up1: }}\n", `line 5: service web: environment: AWS_REGION comes with x-holdfast.buckets: leave it out`},
		{"storage without buckets", top("x-holdfast: {storage: 1GiB}\n"), `line 4: x-holdfast.storage is of buckets, and there are none`},
		{"storage that is no size", web("x-holdfast: {buckets: [up1]}") + "x-holdfast: {buckets: {up1: }, storage: big}\n", `line 5: x-holdfast.storage "big": write what a location keeps at most like 4GiB, at least 256MiB`},
		{"too little storage", web("x-holdfast: {buckets: [up1]}") + "x-holdfast: {buckets: {up1: }, storage: 1MiB}\n", `line 5: x-holdfast.storage "1MiB"`},
		{"an unknown key of a route", top("x-holdfast:\n  routes:\n    - {host: a.localhost, service: web, prt: 80}\n"), `line 6: x-holdfast.routes: "prt" is not supported; it can have host, service, port`},
		{"an unknown key of a service's x-holdfast", web("x-holdfast: {eggress: []}"), `line 4: service web: x-holdfast: "eggress" is not supported; it can have placement, egress`},
		{"an unknown key of a placement", web("x-holdfast: {placement: {farm: a}}"), `line 4: service web: x-holdfast.placement: "farm" is not supported; it can have spread, farms, nodes`},
		{"an unknown key of a volume's x-holdfast", top("volumes: {data: {x-holdfast: {sze: 1}}}\n"), `line 4: volume data: x-holdfast: "sze" is not supported; it can have size`},
		{"routes in a service", web("x-holdfast: {routes: []}"), `line 4: service web: x-holdfast: "routes" is not supported`},
		{"build", web("build: ."), `line 4: service web: "build" cannot be had: build the image and name it under image: a registry reference, or oci:PATH of an OCI layout`},
		{"extends", web("extends: {service: x}"), `"extends" cannot be had: write the service out, or use YAML anchors`},
		{"include", "include: [other.yaml]\n" + web(""), `line 1: the file: "include" cannot be had: write it in one file`},
		{"profiles", web("profiles: [a]"), `"profiles" cannot be had: write one file for each profile`},
		{"label_file, which would read a file", web("label_file: /etc/passwd"), `line 4: service web: "label_file" cannot be had: write labels`},
		{"links", web("links: [db]"), `"links" cannot be had: services find each other by name`},
		{"extra_hosts", web("extra_hosts: ['a:10.0.0.1']"), `"extra_hosts" cannot be had: names resolve inside the overlay; use a network alias`},
		{"ulimits", web("ulimits: {nofile: 1}"), `"ulimits" cannot be had: limits are those of deploy.resources`},
		{"shm_size", web("shm_size: 1g"), `"shm_size" cannot be had: mount a tmpfs at /dev/shm with the size`},
		{"an update that starts first", web("deploy: {update_config: {order: start-first}}"), `line 4: service web: order "start-first" cannot be had`},
		{"an update of a ratio", web("deploy: {update_config: {max_failure_ratio: 0.5}}"), `"max_failure_ratio" cannot be had: one that fails is enough`},
		{"an action on failure that is not known", web("deploy: {update_config: {failure_action: stop}}"), `service web: failure_action "stop": it can be rollback, pause or continue`},
		{"a deadline that is no time", web("x-holdfast: {deadline: soon}"), `service web: deadline "soon": write a time as 90s or 10m`},
		{"a deadline that is too long", web("x-holdfast: {deadline: 48h}"), `service web: deadline of 48h0m0s: up to 24h0m0s is allowed`},
		{"placement as in Swarm", web("deploy: {placement: {constraints: [node.role==manager]}}"), `"placement" cannot be had: say it under x-holdfast.placement`},
		{"the long form of env_file with a format", web("env_file: [{path: a.env, format: raw}]"), `line 4: service web: env_file: "format" cannot be had: the file has KEY=value lines`},

		{"a service without an image", "services:\n  web:\n    command: x\n", `line 2: service "web" has neither an image nor a build context`},
		{"a file without services", "name: a\nservices: {}\n", `it has no services`},
		{"a service with a name that is no host name", "services:\n  My.Web: {image: x}\n", `line 2: service name "My.Web": only a-z, 0-9 and inner - and _ are allowed`},
		{"a contract with an underscore", "name: a_b\n" + web(""), `line 1: name: contract name "a_b" is part of host names: use - instead of _`},
		{"a contract with a bad name", "name: Shop\n" + web(""), `line 1: name: contract name "Shop": only a-z`},
		{"too many replicas", web("deploy:\n  replicas: 33"), `line 5: service web: 33 replicas, 0 to 32 are allowed`},
		{"a negative number of replicas", web("deploy: {replicas: -1}"), `line 4: services.web.deploy.replicas`},
		{"replicas that are no number", web("deploy: {replicas: many}"), `line 4: services.web.deploy.replicas`},
		{"one on every node", web("deploy: {mode: global}"), `line 4: service web: deploy mode "global" cannot be had: say how many replicas`},
		{"too little memory", web("deploy: {resources: {limits: {memory: 5M}}}"), `line 4: service web: memory of 5 MiB, 16 MiB to 1024 GiB are allowed`},
		{"memory that is no size", web("deploy: {resources: {limits: {memory: lots}}}"), `line 4: `},
		{"negative cpus", web("cpus: -1"), `line 4: `},
		{"cpus that are no number", web("deploy: {resources: {limits: {cpus: NaN}}}"), `line 4: `},
		{"no limit of processes", web("pids_limit: -1"), `line 4: service web: -1 processes, 1 to 1048576 are allowed`},
		{"a capability that is not known", web("cap_add: [FLY]"), `line 4: service web: cap_add: capability "FLY" is not known in a sandbox`},
		{"all capabilities", web("cap_add: [ALL]"), `line 4: service web: cap_add: capability ALL cannot be added: name those that are needed`},
		{"a stop signal that is not known", web("stop_signal: SIGFOO"), `line 4: service web: stop signal "SIGFOO" is not known: write a name like SIGTERM`},
		{"a stop grace that is too long", web("stop_grace_period: 48h"), `line 4: service web: stop_grace_period of 48h0m0s, up to 1h0m0s is allowed`},
		{"a relative working directory", web("working_dir: srv"), `line 2: service web: working directory "srv" is not a clean absolute path`},
		{"a host name that is none", web("hostname: 'a b'"), `line 2: service web: `},
		{"an empty entrypoint without a command", web("entrypoint: []"), `line 4: service web: an empty entrypoint needs a command`},
		{"an empty command", web("command: []"), `line 4: service web: an empty command cannot be had: write the entrypoint out`},
		{"a healthcheck that runs nothing", web("healthcheck: {interval: 5s}"), `line 4: service web: healthcheck: test must be [CMD, …], [CMD-SHELL, …] or NONE`},
		{"a healthcheck that does not say how", web("healthcheck: {test: [curl, x]}"), `healthcheck`},
		{"a healthcheck once a week", web("healthcheck: {test: x, interval: 168h}"), `line 4: service web: healthcheck: interval of 168h0m0s, up to 24h0m0s is allowed`},
		{"start_interval", web("healthcheck: {test: x, start_interval: 1s}"), `line 4: service web: healthcheck: "start_interval" cannot be had: a workload is probed often until it first answers`},
		{"a restart that is not known", web("restart: sometimes"), `line 4: service web: restart "sometimes": it can be no, always, on-failure, on-failure:N or unless-stopped`},
		{"a number of restarts that is none", web("restart: on-failure:x"), `restart "on-failure:x"`},
		{"a restart policy that is not known", web("deploy: {restart_policy: {condition: never}}"), `line 4: service web: restart_policy condition "never": it can be none, on-failure or any`},
		{"attempts without on-failure", web("deploy: {restart_policy: {condition: any, max_attempts: 3}}"), `line 4: service web: max_attempts needs the condition on-failure`},
		{"a dependency that is not there", web("depends_on: [db]"), `line 2: service "web" depends on undefined service "db"`},
		{"a dependency on oneself in a circle", web("depends_on: [db]") + "  db: {image: db, depends_on: [web]}\n", `dependency cycle`},
		{"a condition that is not known", web("depends_on: {db: {condition: ready}}") + "  db: {image: db}\n", `line 4: `},
		{"healthy without a healthcheck", web("depends_on: {db: {condition: service_healthy}}") + "  db: {image: db}\n", `line 4: service web waits until db is healthy, but that has no healthcheck: add one, or use service_started`},
		{"completed what never completes", web("depends_on: {db: {condition: service_completed_successfully}}") + "  db: {image: db}\n", `line 4: service web waits until db has completed, but that is started again and again: give it restart: "no" or on-failure`},
		{"a config that is not there", web("configs: [none]"), `line 2: service "web" refers to undefined config none`},
		{"a config without content", web("configs: [c]") + "configs:\n  c:\n", `line 6: config c has neither file nor environment nor content`},
		{"an external secret", web("secrets: [s]") + "secrets: {s: {external: true}}\n", `line 5: secret s: "external" cannot be had`},
		{"a secret of a variable that is not set", web("secrets: [s]") + "secrets: {s: {environment: NOPE}}\n", `line 4: service web: secret s: it takes the variable NOPE, which is not set`},
		{"a secret of a file that is not there", web("secrets: [s]") + "secrets: {s: {file: nope}}\n", `line 4: service web: secret s: `},
		{"a file that belongs to a name", web("configs: [{source: c, uid: root}]") + "configs: {c: {content: c}}\n", `line 4: service web: owner "root" of c is not a number`},
		{"a file with a mode that is none", web("configs: [{source: c, mode: 04755}]") + "configs: {c: {content: c}}\n", `line 4: service web: config c: mode 04755, up to 0777 is allowed`},
		{"tmpfs with other options", web("tmpfs: ['/t:exec']"), `line 4: service web: tmpfs /t: the option "exec" cannot be had: the only one is size`},
		{"tmpfs with a size that is none", web("tmpfs: ['/t:size=x']"), `line 4: service web: tmpfs /t: size "x": write it like 64m`},
		{"an environment name that is none", web("environment: {'A=B': c}"), `line 4: service web: environment: "A=B" is no name`},

		{"a route to a service that is not there", top("x-holdfast:\n  routes:\n    - {host: a.localhost, service: db, port: 80}\n"), `line 6: route a.localhost leads to service "db", which is not there`},
		{"a route without a port", top("x-holdfast: {routes: [{host: a.localhost, service: web}]}\n"), `line 4: route a.localhost: port "": write the number of the port that web listens on`},
		{"a route to an address", top("x-holdfast: {routes: [{host: 203.0.113.1, service: web, port: 80}]}\n"), `line 4: host "203.0.113.1" is an address, a name is needed`},
		{"a route of the grid", top("x-holdfast: {routes: [{host: ledger.grid1.holdfast, service: web, port: 80}]}\n"), `names under .holdfast belong to the grid`},
		{"a route with a wildcard", top("x-holdfast: {routes: [{host: '*.localhost', service: web, port: 80}]}\n"), `line 4: host "*.localhost": only a-z`},
		{"two routes of one host", top("x-holdfast:\n  routes:\n    - {host: a.localhost, service: web, port: 80}\n    - {host: a.localhost, service: web, port: 81}\n"), `line 7: host a.localhost has two routes`},
		{"routes that are no list", top("x-holdfast:\n  routes: {host: a}\n"), `line 5: x-holdfast.routes: it must be a list`},
		{"a route that is no mapping", top("x-holdfast: {routes: [a]}\n"), `line 4: x-holdfast.routes: it must be a mapping`},
		{"a host that is no text", top("x-holdfast: {routes: [{host: [a], service: web, port: 80}]}\n"), `line 4: x-holdfast: `},
		{"an x-holdfast that is no mapping", top("x-holdfast: [a]\n"), `line 4: x-holdfast: it must be a mapping`},
		{"farms that are no list", top("x-holdfast: {placement: {farms: a}}\n"), `line 4: x-holdfast.placement.farms: it must be a list`},
		{"egress that is no list", web("x-holdfast: {egress: 'tcp://0.0.0.0/0'}"), `line 4: service web: x-holdfast.egress: it must be a list`},
		{"a spread that is not known", web("x-holdfast: {placement: {spread: rack}}"), `line 4: service web: x-holdfast.placement: spread "rack": it can be farm or node`},
		{"a farm that is no name", top("x-holdfast: {placement: {farms: [a, 'b c']}}\n"), `line 4: x-holdfast.placement: farm name "b c": only a-z`},
		{"egress that is no rule", web("x-holdfast: {egress: [example.com]}"), `line 4: service web: egress "example.com": write it like tcp://203.0.113.0/24:443`},
		{"egress to a name", web("x-holdfast: {egress: ['tcp://example.com:443']}"), `egress "tcp://example.com:443": write it like`},
		{"egress with a port that is none", web("x-holdfast: {egress: ['tcp://203.0.113.1:0']}"), `write it like`},
		{"egress that hides IPv4 in IPv6", web("x-holdfast: {egress: ['tcp://[::ffff:10.0.0.1]:80']}"), `write it like`},

		{"a variable that is needed", web("command: ${NOPE:?say which}"), `line 4: the variable NOPE is needed and not set: say which`},
		{"a variable that is none", web("command: ${1A}"), `line 4: "${1A}" is not a variable: write ${NAME}`},
		{"a variable that is not closed", web("command: ${A"), `line 4: ${ without its }: write $$ for a $`},
		{"a variable that is no text", web("user: $BINARY"), `line 4: the variable BINARY is not UTF-8 text`},
		{"an environment that is no text", web("environment: [BINARY]"), `line 4: service web: environment: the value of BINARY is not UTF-8 text`},
		{"a key twice", web("user: a\nuser: b"), `line 5: "user" stands on line 4 already`},
		{"two documents", web("") + "---\n" + web("privileged: true"), `line 4: a second document begins: write all of it in one`},
		{"a tag of Compose", web("user: !reset null"), `line 4: the tag !reset is not supported: leave it out`},
		{"binary data", web("user: !!binary aGVsbG8="), `line 4: the tag !!binary is not supported`},
		{"a list instead of a file", "- a\n", `it is not a Compose file: the top is no mapping`},
		{"an empty file", "", `it is empty, and not a Compose file`},
		{"a file of spaces", " \n\n", `it is empty, and not a Compose file`},
		{"no YAML", "a: [b\n", `line `},
	} {
		t.Run(tc.name, func(t *testing.T) {
			path := project(t, tc.compose, nil)
			_, err := Load(t.Context(), Input{Path: path, Env: map[string]string{"FROM_USER": "u", "BINARY": "\xff"}})
			if err == nil {
				t.Fatal("it was accepted")
			}
			if msg, ok := strings.CutPrefix(err.Error(), path+": "); !ok || !strings.Contains(msg, tc.want) {
				t.Errorf("got  %v\nwant %s", err, tc.want)
			}
			if strings.Contains(err.Error(), "the file cannot be read") {
				t.Errorf("a parser panicked: %v", err)
			}
		})
	}
}

// Nothing outside the Compose file's directory is read and sent to a grid, in whatever way the file names it.
func TestNothingOutsideTheProjectIsRead(t *testing.T) {
	use := map[string]string{
		"env_file": "services:\n  web:\n    image: x\n    env_file: [PATH]\n",
		"config":   "services:\n  web:\n    image: x\n    configs: [c]\nconfigs: {c: {file: PATH}}\n",
		"secret":   "services:\n  web:\n    image: x\n    secrets: [c]\nsecrets: {c: {file: PATH}}\n",
		"variable": "services:\n  web:\n    image: x\n    secrets: [c]\nsecrets: {c: {file: '${NONE:-PATH}'}}\n",
	}
	for key, compose := range use {
		for _, tc := range []struct {
			name, path string
			make       func(dir, outside string) error
		}{
			{"by ..", "../outside", nil},
			{"by an absolute path", "OUTSIDE", nil},
			{"by a way through the directory", "sub/../../outside", nil},
			{"by a symbolic link", "link", func(dir, outside string) error { return os.Symlink(outside, filepath.Join(dir, "link")) }},
			{"by a relative symbolic link", "link", func(dir, _ string) error { return os.Symlink("../outside", filepath.Join(dir, "link")) }},
			{"by a directory that is a link", "up/outside", func(dir, outside string) error { return os.Symlink(filepath.Dir(outside), filepath.Join(dir, "up")) }},
		} {
			t.Run(key+" "+tc.name, func(t *testing.T) {
				file := project(t, "", nil)
				dir := filepath.Dir(file)
				outside := filepath.Join(filepath.Dir(dir), "outside")
				if err := os.WriteFile(outside, []byte("KEY=private"), 0o600); err != nil {
					t.Fatal(err)
				}
				if tc.make != nil {
					if err := tc.make(dir, outside); err != nil {
						t.Fatal(err)
					}
				}
				text := strings.ReplaceAll(compose, "PATH", strings.ReplaceAll(tc.path, "OUTSIDE", outside))
				if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
					t.Fatal(err)
				}
				if _, err := Load(t.Context(), Input{Path: file}); err == nil || !strings.Contains(err.Error(), "--outside-files") || strings.Contains(err.Error(), "private") {
					t.Fatalf("%v", err)
				}
				// The control: who allows it gets it, so that the file was there to be read.
				d, err := Load(t.Context(), Input{Path: file, OutsideFiles: true})
				if err != nil {
					t.Fatal(err)
				}
				p := d.Body.Services[0]
				if len(p.Environment) == 1 && p.Environment[0] == "KEY=private" || len(p.Files) == 1 && string(p.Files[0].Data) == "KEY=private" {
					return
				}
				t.Errorf("%+v", p)
			})
		}
	}
}
