package main

import (
	"context"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	stdlog "log"
	"net/http/httptest"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"regexp"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"holdfast/api"
	"holdfast/api/apitest"
	"holdfast/contract"
	"holdfast/identity"
	"holdfast/internal/grid"
	"holdfast/internal/testimage"
	"holdfast/ledger"
	"holdfast/node"
	"holdfast/store"
	"holdfast/store/location"

	"github.com/google/go-containerregistry/pkg/name"
	gcrregistry "github.com/google/go-containerregistry/pkg/registry"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/rogpeppe/go-internal/testscript"
)

// TestMain lets this binary be the program that the scripts run, and one that asks a question.
func TestMain(m *testing.M) {
	testscript.Main(m, map[string]func(){"holdfast": main, "holdfast-asks": func() {
		ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
		defer stop()
		if _, err := askSecret(ctx, "secret?"); errors.Is(err, context.Canceled) {
			os.Exit(exitInterrupted)
		}
	}})
}

// TestScripts runs testdata/script: the specification of every command. Beside testscript's own commands they have
//
//	exits CODE PROGRAM ARGS…   a program that must exit with that code
//	until PATTERN PROGRAM ARGS…  a program whose output comes to match within half a minute
//	grid [DIR]                 a ledger that answers, with an account, as up leaves it in DIR (default $HOLDFAST_DIR)
//	node NAME [REASON]         a node of that grid, which says of all that it is given that it runs, or why it fails
//	machine VAR NAME OWNER     a machine that asks to become a node of a farm of the grid, the user or another; $VAR is its ID
//	stop VAR                   ends that grid's validator; $VAR is its directory
//	image DIR                  an OCI layout
//	program FILE               a static program
//	initramfs FILE [PATH]…     an initramfs with what an image has, and empty files
//	gateway ADDR               leads the user to another gateway
//	seal-key PASSPHRASE        seals the user's key
//	location VAR DIR STORE [FLAG]…  a location in DIR that allows the front end of STORE; $VAR is its URL, ${VAR_pid} its process
//	port VAR                   a port that nobody has
//	noise FILE SIZE            a file
//	s3 put|get|delete PORT CREDENTIALS BUCKET/KEY [FILE], s3 make PORT CREDENTIALS BUCKET   an S3 client
//	recovery VAR PHRASE        $VAR is what a location's --allow has for the key of a phrase
//	moment VAR                 $VAR is the time
//	template VAR NAME VERSION  $VAR is the full name of a template of the grid's user
//	registry DIR NAME          a registry, with the image in DIR as NAME; $REGISTRY is its host and port
//	person VAR DIR             somebody with an account of his own; $VAR is its ID
//	fill FILE                  puts variables into a file
//	proposal VAR DIR           $VAR is what waits first for the consent of the person with DIR
//	loot DIR LOCATION…         a thief with the keys in DIR, who deletes all shards and says that the log is another
//
// There are no machines and no gateway: whatever asks the gateway reaches the ledger's own server.
func TestScripts(t *testing.T) {
	testscript.Run(t, testscript.Params{
		Dir: "testdata/script", RequireExplicitExec: true, RequireUniqueNames: true,
		Setup: func(e *testscript.Env) error {
			e.Setenv("HOLDFAST_DIR", filepath.Join(e.WorkDir, "grid"))
			e.Setenv("HOME", e.WorkDir)
			e.Values["t"] = e.T().(testing.TB)
			return nil
		},
		Condition: func(c string) (bool, error) {
			switch c {
			case "root":
				return os.Geteuid() == 0, nil
			case "static": // this program: with cgo it is not
				bi, ok := debug.ReadBuildInfo()
				return ok && slices.Contains(bi.Settings, debug.BuildSetting{Key: "CGO_ENABLED", Value: "0"}), nil
			}
			return false, fmt.Errorf("unknown condition %q", c)
		},
		Cmds: map[string]func(*testscript.TestScript, bool, []string){
			"exits": exits, "until": repeat, "grid": startGrid, "stop": stopGrid, "node": startNode, "machine": startMachine, "image": writeImage, "initramfs": writeInitramfs, "program": writeProgram, "gateway": otherGateway, "seal-key": sealKey, "location": startLocation,
			"port": freePort, "noise": writeNoise, "s3": askS3,
			"recovery": recoveryKey, "loot": loot, "moment": now, "person": person, "fill": fill, "proposal": proposal, "registry": startRegistry, "template": templateRef,
		},
	})
}

func exits(ts *testscript.TestScript, _ bool, args []string) {
	want, err := strconv.Atoi(args[0])
	ts.Check(err)
	got := 0
	if err := ts.Exec(args[1], args[2:]...); err != nil {
		var ee *exec.ExitError
		if !errors.As(err, &ee) {
			ts.Fatalf("%v", err)
		}
		got = ee.ExitCode()
	}
	if got != want {
		ts.Fatalf("%s exits with %d, want %d", strings.Join(args[1:], " "), got, want)
	}
}

func repeat(ts *testscript.TestScript, _ bool, args []string) {
	want := regexp.MustCompile("(?m)" + args[0])
	for end := time.Now().Add(30 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		err := ts.Exec(args[1], args[2:]...)
		if err == nil && want.MatchString(ts.ReadFile("stdout")) {
			return
		}
		if time.Now().After(end) {
			ts.Fatalf("%s does not show %q: %v", strings.Join(args[1:], " "), args[0], err)
		}
	}
}

// theGrid is what startGrid leaves for startNode.
type theGrid struct {
	*apitest.Grid
	client  *api.Client
	account identity.AccountID
	nodes   byte
	farms   map[string]identity.FarmID // of machines, by owner
}

func startGrid(ts *testscript.TestScript, _ bool, args []string) {
	dir := ts.Getenv("HOLDFAST_DIR")
	if len(args) > 0 {
		dir = ts.MkAbs(args[0])
	}
	t := ts.Value("t").(testing.TB)
	g := &theGrid{Grid: apitest.Start(t, nil), farms: map[string]identity.FarmID{}}
	g.client = g.Client(nil)
	keys := apitest.Key(7)
	g.account = g.Account(g.client, keys)
	ts.Check(os.MkdirAll(dir, 0o700))
	ts.Check(os.WriteFile(filepath.Join(dir, "genesis"), g.Genesis.Encode(), 0o600))
	writeClient(ts, dir, grid.Client{Gateway: g.Addr(), Account: g.account})
	ts.Check(identity.WriteKeyFile(filepath.Join(dir, "user.key"), keys, ""))
	ts.Check(identity.WriteKeyFile(filepath.Join(dir, "grid.key"), g.Admin, ""))
	ts.Setenv("GATEWAY", g.Addr())
	grids.Store(t, g)
	t.Cleanup(func() { grids.Delete(t) })
}

func person(ts *testscript.TestScript, _ bool, args []string) {
	ts.Check(ts.Exec("holdfast", "--dir", ts.MkAbs(args[1]), "--json", "account", "create", "--genesis", filepath.Join(ts.Getenv("HOLDFAST_DIR"), "genesis"), "--gateway", ts.Getenv("GATEWAY")))
	var out struct{ Account string }
	ts.Check(json.Unmarshal([]byte(ts.ReadFile("stdout")), &out))
	ts.Setenv(args[0], out.Account)
}

func templateRef(ts *testscript.TestScript, _ bool, args []string) {
	v, ok := grids.Load(ts.Value("t"))
	if !ok {
		ts.Fatalf("there is no grid")
	}
	ts.Setenv(args[0], v.(*theGrid).account.String()+"/"+args[1]+"@"+args[2])
}

func startRegistry(ts *testscript.TestScript, _ bool, args []string) {
	s := httptest.NewTLSServer(gcrregistry.New(gcrregistry.Logger(stdlog.New(io.Discard, "", 0))))
	ts.Defer(s.Close)
	host, trusted := strings.TrimPrefix(s.URL, "https://"), ts.MkAbs("registry.pem")
	ts.Check(os.WriteFile(trusted, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: s.Certificate().Raw}), 0o600))
	ts.Setenv("SSL_CERT_FILE", trusted)
	ts.Setenv("REGISTRY", host)
	index, err := layout.ImageIndexFromPath(ts.MkAbs(args[0]))
	ts.Check(err)
	manifest, err := index.IndexManifest()
	ts.Check(err)
	img, err := index.Image(manifest.Manifests[0].Digest)
	ts.Check(err)
	ref, err := name.ParseReference(host + "/" + args[1])
	ts.Check(err)
	ts.Check(remote.Write(ref, img, remote.WithTransport(s.Client().Transport)))
}

func fill(ts *testscript.TestScript, _ bool, args []string) {
	ts.Check(os.WriteFile(ts.MkAbs(args[0]), []byte(os.Expand(ts.ReadFile(args[0]), func(k string) string {
		if k == "$" {
			return "$"
		}
		return ts.Getenv(k)
	})), 0o600))
}

func proposal(ts *testscript.TestScript, _ bool, args []string) {
	ts.Check(ts.Exec("holdfast", "--dir", ts.MkAbs(args[1]), "--json", "contract", "proposals"))
	var out struct{ Own, Asked []struct{ ID string } }
	ts.Check(json.Unmarshal([]byte(ts.ReadFile("stdout")), &out))
	all := append(out.Asked, out.Own...)
	if len(all) == 0 {
		ts.Fatalf("nothing is proposed to %s", args[1])
	}
	ts.Setenv(args[0], all[0].ID)
}

func stopGrid(ts *testscript.TestScript, _ bool, args []string) {
	found, _ := grids.Load(ts.Value("t"))
	g := found.(*theGrid)
	g.Stop()
	ts.Setenv(args[0], g.Data)
}

func writeClient(ts *testscript.TestScript, dir string, c grid.Client) {
	b, err := json.Marshal(c)
	ts.Check(err)
	ts.Check(os.WriteFile(filepath.Join(dir, "client.json"), b, 0o600))
}

// elf is a program for x86-64 that has no segments.
const elf = "\x7fELF\x02\x01\x01\x00\x00\x00\x00\x00\x00\x00\x00\x00\x02\x00\x3e\x00\x01\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00" +
	"\x40\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x40\x00\x38\x00\x00\x00\x40\x00\x00\x00\x00\x00"

func writeProgram(ts *testscript.TestScript, _ bool, args []string) {
	ts.Check(os.WriteFile(ts.MkAbs(args[0]), []byte(elf), 0o700))
}

func writeInitramfs(ts *testscript.TestScript, _ bool, args []string) {
	var b strings.Builder
	add := func(path string, mode int, body string) {
		fmt.Fprintf(&b, "070701%08x%08x%016x%08x%08x%08x%032x%08x%08x", b.Len(), mode, 0, 1, 0, len(body), 0, len(path)+1, 0)
		for _, part := range []string{path + "\x00", body} {
			b.WriteString(part)
			b.WriteString(strings.Repeat("\x00", -b.Len()&3))
		}
	}
	add("init", 0o120777, "bin/holdfast")
	add("bin/holdfast", 0o100755, elf)
	add("bin/holdfast-runsc", 0o100755, elf)
	for _, path := range args[1:] {
		add(path, 0o100444, "")
	}
	add("TRAILER!!!", 0, "")
	ts.Check(os.WriteFile(ts.MkAbs(args[0]), []byte(b.String()), 0o600))
}

func otherGateway(ts *testscript.TestScript, _ bool, args []string) {
	found, _ := grids.Load(ts.Value("t"))
	writeClient(ts, ts.Getenv("HOLDFAST_DIR"), grid.Client{Gateway: args[0], Account: found.(*theGrid).account})
}

// grids are the scripts' grids, by test: a script has no place for values that come after its setup.
var grids sync.Map

func startNode(ts *testscript.TestScript, _ bool, args []string) {
	t := ts.Value("t").(testing.TB)
	found, _ := grids.Load(t)
	g := found.(*theGrid)
	g.nodes++
	n := g.Node(g.client, args[0], 100+g.nodes)
	reason := ""
	if len(args) > 1 {
		var err error
		reason, err = strconv.Unquote(`"` + args[1] + `"`)
		ts.Check(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		speak(ctx, g, n, reason)
	}()
	t.Cleanup(func() { cancel(); <-done })
	g.Up(g.client, n)
}

func startMachine(ts *testscript.TestScript, _ bool, args []string) {
	found, _ := grids.Load(ts.Value("t"))
	g := found.(*theGrid)
	owner := g.Genesis.GridAccount()
	switch args[2] {
	case "user":
		owner = g.account
	case "other":
		owner = g.Account(g.client, apitest.Key(99))
	}
	if _, ok := g.farms[args[2]]; !ok {
		tx, err := g.client.Act(g.Context(), ledger.KindFarmAdmit, ledger.Actor{ID: g.Genesis.GridAccount()}, &ledger.FarmAdmit{Name: "farm-of-" + args[2], Owner: owner}, g.Admin.DeviceKey())
		ts.Check(err)
		g.farms[args[2]] = identity.FarmID(tx.ID())
	}
	g.nodes++
	keys, err := node.DeriveKeys([identity.SeedSize]byte{g.nodes})
	ts.Check(err)
	a, err := keys.Admission(g.client.Grid(), g.farms[args[2]], args[1], []string{"2001:db8::9"}, node.Offer{CPUMilli: 2000, Memory: 4 << 30})
	ts.Check(err)
	ts.Check(g.client.Announce(g.Context(), a))
	ts.Setenv(args[0], keys.ID.String())
	ts.Setenv(args[0]+"_short", keys.ID.Short())
}

// startLocation runs a location until the script ends, by a signal, as its user would.
func startLocation(ts *testscript.TestScript, _ bool, args []string) {
	keys, err := store.LoadKeys(filepath.Join(ts.MkAbs(args[2]), s3Keys))
	ts.Check(err)
	pin, err := location.PinOf(keys.TLS())
	ts.Check(err)
	cmd := exec.Command("holdfast", append([]string{"run", "location", "--json", "--dir", ts.MkAbs(args[1]), "--listen", "127.0.0.1:0", "--allow", pin.String() + ":read,write,delete"}, args[3:]...)...)
	out, err := cmd.StdoutPipe()
	ts.Check(err)
	ts.Check(cmd.Start())
	ts.Defer(func() {
		cmd.Process.Signal(os.Interrupt)
		if err := cmd.Wait(); err != nil {
			ts.Logf("run location: %v", err)
		}
	})
	var at struct{ URL string }
	ts.Check(json.NewDecoder(out).Decode(&at))
	ts.Setenv(args[0], at.URL)
	ts.Setenv(args[0]+"_pid", strconv.Itoa(cmd.Process.Pid))
}

// speak is a node that does nothing but talk.
func speak(ctx context.Context, g *theGrid, n *apitest.Node, reason string) {
	for {
		var reports []ledger.Report
		ids, err := api.Get[[]contract.ID](ctx, g.client, ledger.NodeWorkKey(n.ID))
		if err != nil {
			ids = &[]contract.ID{}
		}
		for _, id := range *ids {
			rec, err := api.Get[ledger.Contract](ctx, g.client, ledger.ContractKey(id))
			if err != nil {
				continue
			}
			as, err := api.Get[ledger.Assignments](ctx, g.client, ledger.AssignmentsKey(id))
			if err != nil {
				continue
			}
			for _, a := range as.Current {
				r := ledger.Report{Workload: a.Workload, Contract: id, Service: a.Service, Replica: a.Replica, Epoch: a.Epoch, Revision: rec.Revision, State: ledger.StateRunning}
				if reason != "" {
					r.State, r.Reason = ledger.StateFailed, reason
				}
				reports = append(reports, r)
			}
		}
		g.client.Heartbeat(ctx, n.Heartbeat(reports...).Encode())
		select {
		case <-ctx.Done():
			return
		case <-time.After(100 * time.Millisecond):
		}
	}
}

func writeImage(ts *testscript.TestScript, _ bool, args []string) {
	img := testimage.New(ocispec.ImageConfig{Cmd: []string{"/server"}}, testimage.Layer(testimage.Entry{Data: []byte("no program")}))
	ts.Check(img.WriteLayout(ts.MkAbs(args[0])))
}

func sealKey(ts *testscript.TestScript, _ bool, args []string) {
	path := filepath.Join(ts.Getenv("HOLDFAST_DIR"), "user.key")
	k, err := identity.ReadKeyFile(path, "")
	ts.Check(err)
	ts.Check(os.Remove(path))
	ts.Check(identity.WriteKeyFile(path, k, args[0]))
}
